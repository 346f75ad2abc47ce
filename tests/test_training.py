"""A training that is killed goes on as if nothing had happened."""

import json
import random
from pathlib import Path

import pytest
import torch
import workers
from safetensors.torch import load_file

from sgd import training
from sgd.files import read_json, read_jsonl, write_jsonl
from sgd.layouts import stream_pieces
from sgd.students import train_tokenizer
from sgd.training import (
    BEST,
    CHECKPOINT,
    Names,
    batches,
    encode_trajectory,
    fit_student,
    read_data,
    renamed,
)

STEPS = 60


def fit(out: Path, small: dict, roles: str = "flat", **more) -> Path:
    "A training of a few seconds that writes a checkpoint at every step."
    kept = training._finish

    def finish(run, *rest):
        (out / "losses.json").write_text(json.dumps(run.state["losses"]))
        return kept(run, *rest)

    training._finish = finish
    config = {"model": workers.LFM2, "steps": STEPS, "batch": 2, "context": 512, "vocab": 600}
    config |= {"every": 7, "save_seconds": 0, "per_task": 2, "dev_per_task": 1, "threads": 1}
    config |= {"rename": 0.5}
    paths = [small[k] for k in ("train", "dev", "train_notes", "dev_notes")]
    try:
        return fit_student(out, *paths, roles=roles, **{**config, **more})
    finally:
        training._finish = kept


def record(folder: Path) -> dict:
    "What a training leaves, without its seconds."
    found = read_json(folder / "training.json")
    curve = [{k: v for k, v in p.items() if k != "seconds"} for p in found["curve"]]
    losses = json.loads((folder / "losses.json").read_text())
    return {**found, "curve": curve, "seconds": 0, "losses": losses}


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_losses_and_weights(small, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert workers.interrupted(fit, (whole, small), lambda: 0, kills=0) == 0
    killed = workers.interrupted(
        fit, (cut, small), lambda: workers.changed(cut / CHECKPOINT), kills=10, wait=0.3
    )
    assert killed >= 8
    assert record(cut) == record(whole)
    a, b = (load_file(f / "model.safetensors") for f in (cut, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(record(whole)["losses"]) == STEPS
    assert not list(cut.glob("*.part"))


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory) -> dict[str, dict]:
    "The records of a flat and of a hierarchical training."
    folder = tmp_path_factory.mktemp("pair")
    for roles in ("flat", "hierarchical"):
        fit(folder / roles, small, roles, steps=6, every=3)
    return {r: {**record(folder / r), "folder": folder / r} for r in ("flat", "hierarchical")}


def test_flat_and_hierarchical_have_equal_parameters_and_steps(pair):
    flat, hierarchical = pair["flat"], pair["hierarchical"]
    assert flat["params"] == hierarchical["params"]
    assert len(flat["losses"]) == len(hierarchical["losses"]) == 6
    a, b = (read_json(p["folder"] / "tokenizer.json")["model"]["vocab"] for p in pair.values())
    assert a == b


def test_done_is_not_done_again_and_other_settings_are_not_resumed(pair, small):
    folder = pair["flat"]["folder"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    fit(folder, small, "flat", steps=6, every=3)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    fit(folder, small, "flat", steps=6, every=3, seed=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns != before


def test_changed_data_of_the_same_size_are_not_resumed(small, tmp_path):
    rows = read_jsonl(small["train"])
    mine = {**small, "train": write_jsonl(tmp_path / "train.jsonl", rows)}

    def stop(*_):
        raise KeyboardInterrupt

    real, training._judge_and_keep = training._judge_and_keep, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "s", mine, steps=9)
    finally:
        training._judge_and_keep = real
    assert (tmp_path / "s" / CHECKPOINT).exists()
    size = mine["train"].stat().st_size
    rows[0]["description"] = rows[0]["description"][::-1]
    write_jsonl(mine["train"], rows)
    assert mine["train"].stat().st_size == size
    fit(tmp_path / "s", mine, steps=9)
    fit(tmp_path / "fresh", mine, steps=9)
    assert record(tmp_path / "s") == record(tmp_path / "fresh")


@pytest.mark.parametrize("name", [CHECKPOINT, BEST])
def test_a_torn_file_is_named_and_the_training_done_again(small, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patched:
        patched.setattr(training, "_finish", lambda *_: None)
        fit(tmp_path / "s", small, steps=2, every=1)
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f"{name}.* is torn .*: trained from the start"):
        fit(tmp_path / "s", small, steps=2, every=1)
    fit(tmp_path / "fresh", small, steps=2, every=1)
    assert record(tmp_path / "s")["losses"] == record(tmp_path / "fresh")["losses"]


def test_nobody_learns_from_test_paths_whatever_their_file_is_called(small, tmp_path):
    rows = [r | {"split": "test"} for r in read_jsonl(small["train"])]
    hidden = write_jsonl(tmp_path / "extra.jsonl", rows)
    with pytest.raises(PermissionError, match="extra.jsonl, got test ones"):
        fit(tmp_path / "s", {**small, "train": hidden})


def test_train_and_dev_share_no_path(small, tmp_path):
    with pytest.raises(ValueError, match="without a common path, got .* in both"):
        fit(tmp_path / "s", {**small, "dev": small["train"], "dev_notes": small["train_notes"]})


def test_missing_annotations_are_an_error_that_names_one(small, tmp_path):
    notes = read_jsonl(small["train_notes"])
    few = write_jsonl(tmp_path / "few.jsonl", notes[1:])
    gone = (notes[0]["task"], notes[0]["variation"])
    with pytest.raises(ValueError, match="1 are missing, the first .*try `sgd run 20_annotate`"):
        read_data(small["train"], few, None)
    with pytest.raises(ValueError, match=f"{gone[0]}', {gone[1]}"):
        fit(tmp_path / "s", {**small, "train_notes": few}, "hierarchical", per_task=None)


def test_batches_are_the_same_wherever_they_start_and_cover_each_epoch():
    lengths = [7 * k % 31 for k in range(50)]
    stream = batches(lengths, 4, seed=3)
    first = [next(stream) for _ in range(39)]
    for start in (1, 12, 13, 27):
        rest = batches(lengths, 4, seed=3, start=start)
        assert [next(rest) for _ in range(39 - start)] == first[start:]
    for epoch in range(3):
        assert sorted(i for b in first[13 * epoch : 13 * (epoch + 1)] for i in b) == list(range(50))
    assert first[:13] != first[13:26]
    other = batches(lengths, 4, seed=4)
    assert first != [next(other) for _ in range(39)]


def test_steps_that_play_never_meets_are_left_out(small):
    for t, _ in read_data(small["train"], None, None, max_moves=5):
        begun = [0, *(s["moves"] for s in t["steps"])][:-1]
        assert all(m <= 5 for m in begun)
    long = [t for t, _ in read_data(small["train"], None, None, max_moves=5)]
    full = [t for t, _ in read_data(small["train"], None, None, max_moves=10_000)]
    assert sum(len(t["steps"]) for t in long) < sum(len(t["steps"]) for t in full)


@pytest.fixture(scope="module")
def named(annotated):
    "A tokenizer, windows of many tasks with sub-goals, and the names in them."
    few = annotated[::25]
    texts = (p.text for t, s in few for pieces in stream_pieces(t, s) for p in pieces)
    tokenizer = train_tokenizer(texts, 2048)
    coded = [encode_trajectory(tokenizer, t, s, ("plan", "act"), 4096, 0.2) for t, s in few]
    windows = [w for ws in coded for w in ws]
    return tokenizer, windows, Names(tokenizer, windows)


def test_a_name_is_exchanged_everywhere_and_never_for_one_that_is_there(named):
    tokenizer, windows, names = named
    touched = 0
    for k, w in enumerate(windows):
        other = renamed(w, names, random.Random(k), 0.7)
        pairs = set(zip(w.ids, other.ids))
        assert len(pairs) == len(set(w.ids)) == len(set(other.ids)), "one to one"
        assert other.weights == w.weights
        changed = {a for a, b in pairs if a != b}
        touched += bool(changed)
        assert not {b for a, b in pairs if a != b} & set(w.ids)
        for a in changed:
            forms = [i for i in names.of[a].values() if i in w.ids]
            first = [w.weights[w.ids.index(i)] for i in forms]
            assert set(first) != {1.0}, "the world says it, in one case or the other, first"
        assert other == renamed(w, names, random.Random(k), 0.7)
    assert touched > len(windows) / 2


def test_what_begins_a_decision_stays(named):
    tokenizer, windows, names = named
    for w in windows:
        other = renamed(w, names, random.Random(0), 1.0)
        at = [k for k, i in enumerate(w.ids[:-1]) if i in names.marks]
        assert [w.ids[k + 1] for k in at] == [other.ids[k + 1] for k in at]


def test_upper_and_lower_case_change_together(named):
    tokenizer, windows, names = named
    seen = 0
    for k, w in enumerate(windows):
        map_ = dict(zip(w.ids, renamed(w, names, random.Random(k), 1.0).ids))
        for i in [i for i in map_ if i in names.of and len(names.of[i]) == 2]:
            if (twin := next(j for j in names.of[i].values() if j != i)) in map_:
                a, b = (tokenizer.decode([map_[x]]).lower() for x in (i, twin))
                seen += map_[i] != i
                assert a == b
    assert seen


def test_no_names_change_without_a_share_and_none_in_the_step_layout(named, small, tmp_path):
    _, windows, names = named
    assert renamed(windows[0], names, random.Random(0), 0.0) == windows[0]
    with pytest.raises(ValueError, match="expected rename=0 in the step layout"):
        fit(tmp_path / "s", small, layout="step", rename=0.1)
