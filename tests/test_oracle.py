"""Collections: complete after any kill, honest about what they leave out, closed to the test split."""

import json
import random
from pathlib import Path

import pytest
import workers

from sgd import oracle
from sgd.files import RowLog, content_sha, read_jsonl, root, sidecar, task_key, write_jsonl
from sgd.oracle import clean_path, data_card, load_trajectories, verify_sample, why_excluded
from sgd.world import variations

TWO = ["lifespan-longest-lived", "find-animal"]


def collected(out: Path) -> None:
    "A collection of a few seconds."
    oracle.collect(out, "train", TWO, per_task=6, workers=1, replays=1, memory_mb=256)


def test_idle_actions_are_dropped_and_the_first_real_one_stays():
    path = ["look around", "open door to hall", "close door to hall", "look around", "0", "wait1"]
    assert clean_path(path) == ["open door to hall", "wait1"]
    assert clean_path(["focus on dog", "look around"])[0] == "focus on dog"
    assert clean_path(["look at door", "look in cupboard", "close cupboard"]) == [
        "look at door",
        "look in cupboard",
        "close cupboard",
    ]


@pytest.mark.slow
def test_killed_at_random_points_the_collection_equals_an_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    workers.interrupted(collected, (whole,), lambda: 0, kills=0)
    part = cut / "train.all.jsonl.part"
    assert (
        workers.interrupted(collected, (cut,), lambda: workers.size(part), kills=10, wait=0.3) >= 8
    )
    a, b = whole / "train.jsonl.gz", cut / "train.jsonl.gz"
    assert content_sha(a) == content_sha(b)
    facts = [{**sidecar(p)["facts"]} for p in (a, b)]
    assert facts[0] == facts[1] and facts[0]["collected"] == 12
    for t in read_jsonl(a):
        assert t["steps"][-1]["done"] and t["score"] == 100 and t["flips"] == 0
        assert not t["steps"][0]["action"].startswith("look around")
    assert not list(cut.glob("*.part"))


@pytest.mark.slow
def test_a_random_sample_of_the_release_repeats_word_for_word(oracle_folder, tmp_path, released):
    short = [t for t in released["train"] if len(t["steps"]) < 60]
    path = write_jsonl(tmp_path / "train.jsonl", random.Random(0).sample(short, 12))
    sample = verify_sample(path, n=4, workers=2)
    assert len(sample) == 4 and all(s["same"] for s in sample)
    rows = read_jsonl(path)
    for t in rows:
        t["steps"][-1]["observation"] += "."
    sample = verify_sample(write_jsonl(path, rows), n=2, workers=2)
    assert not any(s["same"] for s in sample)


def row(variation: int, score: int, replays: list[int]) -> dict:
    "A trajectory with the fields that the decision needs."
    played = [{"seed": k, "score": s, "same_text": s == score} for k, s in enumerate(replays)]
    flips = sum(not p["same_text"] for p in played)
    facts = {"task": "boil", "variation": variation, "split": "train", "steps": []}
    return {**facts, "score": score, "replays": played, "flips": flips}


def test_what_is_left_out_is_listed_with_the_reason(tmp_path):
    log = RowLog(tmp_path / "train.all.jsonl")
    for k, (score, replays) in enumerate([(100, [100, 100]), (50, [50]), (100, [100, 37])]):
        log.append(row(k, score, replays))
    path = oracle._store(tmp_path / "train.jsonl.gz", log, {"split": "train"}, set(log.done))
    assert [t["variation"] for t in read_jsonl(path)] == [0]
    facts = sidecar(path)["facts"]
    assert (facts["collected"], facts["kept"], facts["flips"]) == (3, 1, 1)
    assert facts["excluded"] == [
        {"task": "boil", "variation": 1, "why": "score 50"},
        {"task": "boil", "variation": 2, "why": "replays scored [100, 37]"},
    ]


def test_rows_that_nobody_asked_for_stay_out(tmp_path, released):
    log = RowLog(tmp_path / "train.all.jsonl")
    for row in released["train"][:3]:
        log.append(row)
    wanted = {task_key(row) for row in released["train"][:2]}
    path = oracle._store(tmp_path / "train.jsonl.gz", log, {"split": "train"}, wanted)
    assert {task_key(row) for row in read_jsonl(path)} == wanted
    assert sidecar(path)["facts"]["collected"] == 2


def test_the_release_holds_solved_paths_and_says_what_it_left_out(oracle_folder, released):
    for split, rows in released.items():
        assert not [why for t in rows if (why := why_excluded(t))]
        assert len({(t["task"], t["variation"]) for t in rows}) == len(rows)
        record = sidecar(oracle_folder / f"{split}.jsonl.gz")
        facts = record["facts"]
        assert facts["kept"] == len(rows) and facts["flips_same_seed"] == 0
        assert facts["collected"] == len(rows) + len(facts["excluded"])
        assert all(e["why"] for e in facts["excluded"])
        per_task = record["params"]["per_task"]
        for t in {t["task"] for t in rows}:
            asked = set(variations(t, split, per_task))
            have = {r["variation"] for r in rows if r["task"] == t}
            out = {e["variation"] for e in facts["excluded"] if e["task"] == t}
            assert have | out == asked and not have & out


def test_test_paths_open_for_the_oracles_row_only(tmp_path, released):
    path = write_jsonl(tmp_path / "test.jsonl.gz", released["train"][:2])
    with pytest.raises(PermissionError, match="only the oracle's own row may open test paths"):
        load_trajectories(path)
    assert len(load_trajectories(path, oracle_row=True)) == 2


def test_some_tasks_and_the_first_of_each(tmp_path, released):
    path = write_jsonl(tmp_path / "train.jsonl", released["train"])
    rows = load_trajectories(path, tasks=["1-1", "find-animal"], per_task=2)
    assert [t["task"] for t in rows] == ["boil", "boil", "find-animal", "find-animal"]
    assert json.dumps(rows[0]) == json.dumps(released["train"][0])


def test_the_card_says_what_the_sidecars_say():
    card = (root() / "data/CARD.md").read_text()
    assert card == data_card(root() / "data/oracle")
