"""Costs: FLOPs agree with a counter that watches the forward pass; money adds up; published numbers stay as they are."""

import json
import math
import re
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Lfm2Config,
    LlamaConfig,
    T5Config,
)

from sgd.costs import (
    EFFICIENCY,
    Prices,
    annotation_cost,
    annotation_estimate,
    break_even,
    episode_flops,
    flops,
    machine_seconds,
    our_costs,
    paid_back,
    published_costs,
    resolve_cost,
    write_efficiency,
)
from sgd.files import (
    file_sha,
    read_json,
    read_jsonl,
    root,
    sidecar,
    write_json,
    write_jsonl,
    write_sidecar,
)
from sgd.llm_teachers import load_examples
from sgd.output import fixed, locate, read_csv
from sgd.prompts import about_tokens
from sgd.stats import Run

sys.path.insert(0, str(Path(__file__).parent))
from simulated import PLACES, SHA, make_project, release, write_runs  # noqa: E402

REPORTED = root() / "paper_results" / "reported"
SHEET = root() / "data" / "prices.yaml"
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SMALL)
LFM2 = Lfm2Config(**SMALL, full_attn_idxs=[1, 3], block_multiple_of=16)
WIDTHS = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2}
T5 = T5Config(**WIDTHS, num_decoder_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
OLD_T5 = T5Config(**WIDTHS, num_heads=4, feed_forward_proj="relu")


def watched(model, **inputs):
    "FLOPs that a counter sees in one forward pass."
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def ids(n):
    return torch.ones(1, n, dtype=torch.long)


@pytest.mark.parametrize("config", [LLAMA, LFM2], ids=["llama", "lfm2"])
def test_decoder_flops_agree_with_a_counter(config):
    "The counter sees a full square of attention; a kept stream pays for half of it and the diagonal."
    n = 48
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    attending = sum(
        k == "full_attention"
        for k in getattr(config, "layer_types", None) or ["full_attention"] * 4
    )
    square = attending * 4 * config.hidden_size * (n * n - n * (n + 1) / 2)
    counted = flops(config, n - 8, 8) + square
    assert counted == pytest.approx(watched(model, input_ids=ids(n)), rel=0.02)


@pytest.mark.parametrize("config", [T5, OLD_T5], ids=["gated", "plain"])
def test_encoder_decoder_flops_agree_with_a_counter(config):
    n, m = 40, 12
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    square = config.num_decoder_layers * 4 * 32 * (m * m - m * (m + 1) / 2)
    counted = flops(config, n, m) + square
    assert counted == pytest.approx(
        watched(model, input_ids=ids(n), decoder_input_ids=ids(m)), rel=0.02
    )


def test_flops_of_separate_calls_and_of_no_call():
    assert flops(T5, 400, 40, calls=4) == pytest.approx(4 * flops(T5, 100, 10))
    assert flops(LLAMA, 100, 10, calls=0) == 0.0


def test_attention_stops_growing_at_the_context():
    short = LlamaConfig(**SMALL, max_position_embeddings=64)
    assert flops(short, 64, 0) == flops(LLAMA, 64, 0)
    assert flops(short, 640, 0) < flops(LLAMA, 640, 0)


def test_two_networks_share_the_tokens():
    row = {"actions": 10, "tokens_in": 80, "tokens_out": 20}
    assert episode_flops(row, [LLAMA, LLAMA]) == pytest.approx(2 * flops(LLAMA, 40, 10))


def test_prices_say_where_they_are_from():
    prices = Prices(SHEET)
    assert prices.tokens("gpt-4", 1e6, 1e6) == 90.0
    assert prices.hours("two-cores", 7200) == pytest.approx(0.1632)
    for kind in ("models", "machines"):
        for name, entry in prices.sheet[kind].items():
            assert entry["source"] and entry["confidence"] in (
                "primary",
                "secondary",
                "unverified",
            ), name
    with pytest.raises(ValueError, match="expected one of the models .* got 'gpt-9'.* try"):
        prices.tokens("gpt-9", 1)


def test_break_even():
    assert break_even(10, 0.5, 1.0) == 20
    assert break_even(10.1, 0.5, 1.0) == 21
    assert break_even(10, 1.0, 1.0) == math.inf


def test_published_numbers_are_left_as_they_are():
    table = published_costs(REPORTED).set_index("agent")
    assert table["tokens_per_action"].to_dict() == {
        "SayCan": "1855.84",
        "ReAct": "1971.03",
        "Reflexion": "2983.46",
        "SwiftSage": "757.07",
    }


def write_inputs(home, kinds, seeds=(0,)):
    "Trajectories, annotations, students and training records, where `kinds` says."
    steps = [{"action": a} for a in ("open door to kitchen", "go to kitchen", "pick up pot")]
    path = {"task": "find-plant", "variation": 0, "description": "Find a plant.", "steps": steps}
    segments = [
        {"subgoal": "navigate_to(kitchen)", "first": 0, "last": 1},
        {"subgoal": "pick_up(pot)", "first": 2, "last": 2},
    ]
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    row = {"task": "find-plant", "variation": 0, "segments": segments, "usage": usage}
    for split in ("train", "dev"):
        told = write_jsonl(
            home / kinds["oracle"] / f"{split}.jsonl.gz", [path, path | {"variation": 1}]
        )
        write_sidecar(told, "oracle.collect", {"split": split})
        for teacher in ("program", "random"):
            cut = write_jsonl(home / kinds["annotations"] / f"{teacher}.{split}.jsonl.gz", [row])
            write_sidecar(cut, "teachers.annotate", {}, seed=0)
    agents = ("flat", "hierarchical-program", "hierarchical-random")
    for name in (f"{agent}.s{seed}" for agent in agents for seed in seeds):
        folder = home / kinds["students"] / name
        LFM2.save_pretrained(folder)
        write_sidecar(folder, "training.train", {}, seed=int(name[-1]))
        record = {"seconds": 1800.0 + 60 * int(name[-1]), "tokens_seen": 10**6}
        write_json(home / kinds["rows"] / f"{name}.training.json", record)


@pytest.fixture
def project(tmp_path):
    "Simulated rows with trajectories, annotations, students and training records."
    write_runs(tmp_path / "runs", seeds=(0,))
    kinds = {"oracle": "oracle", "annotations": "annotations", "students": "students"}
    write_inputs(tmp_path, kinds | {"rows": "runs"})
    return tmp_path


def efficiency(home, out):
    names = ("oracle", "annotations", "students")
    return write_efficiency(
        home / "runs", REPORTED, *(home / n for n in names), SHEET, home / out, home / out
    )


def test_a_program_costs_nothing_and_its_estimate_names_the_rule(project):
    files = [project / "annotations" / "program.train.jsonl.gz"]
    assert annotation_cost(files) == {
        "trajectories": 1,
        "tokens_in": 0,
        "tokens_out": 0,
        "usd": 0.0,
        "unknown": 0,
    }
    guess = annotation_estimate([project / "oracle" / "train.jsonl.gz"], files, load_examples())
    assert guess["tokens_in"] > guess["tokens_out"] > 10 and "letters" in guess["rule"]


def test_the_estimate_counts_the_very_requests_that_are_released(tmp_path):
    requests = read_jsonl(root() / "data" / "annotations" / "requests_spans.jsonl")
    sent = {tuple(r["custom_id"].split(".")[:2]): r["body"]["messages"] for r in requests}
    asked = lambda t: sent.get((t["task_id"], f"v{t['variation']}"))  # noqa: E731
    paths = [t for t in read_jsonl(root() / "data" / "oracle" / "train.jsonl.gz") if asked(t)][::40]
    assert len(paths) > 4
    told = write_jsonl(tmp_path / "train.jsonl.gz", paths)
    whole = [
        {"task": t["task"], "variation": t["variation"]}
        | {"segments": [{"subgoal": "do()", "first": 0, "last": len(t["steps"]) - 1}]}
        for t in paths
    ]
    guess = annotation_estimate(
        [told], [write_jsonl(tmp_path / "cut.jsonl.gz", whole)], load_examples()
    )
    assert guess["tokens_in"] == sum(about_tokens(asked(t)) for t in paths)
    answers = [f"1. do(): 1-{len(t['steps'])}" for t in paths]
    assert guess["tokens_out"] == sum(map(about_tokens, answers))


def test_a_paid_teacher_is_billed_as_it_says(tmp_path):
    usage = {"prompt_tokens": 900, "completion_tokens": 80, "cost": 0.0318}
    write_jsonl(tmp_path / "llm.train.jsonl.gz", [{"usage": usage}, {"usage": usage}])
    spent = annotation_cost([tmp_path / "llm.train.jsonl.gz"])
    assert (spent["tokens_in"], spent["tokens_out"]) == (1800, 160)
    assert spent["usd"] == pytest.approx(0.0636)
    lost = {"usage": {"prompt_tokens": None, "completion_tokens": None, "cost": None}}
    write_jsonl(tmp_path / "llm.dev.jsonl.gz", [lost, {"usage": usage}])
    spent = annotation_cost([tmp_path / "llm.dev.jsonl.gz"])
    assert (spent["unknown"], spent["tokens_in"], spent["usd"]) == (1, 900, 0.0318)


@pytest.mark.parametrize(
    "seconds, width, expected",
    [(90.0, 8, 3.0), (None, 8, 2.5), (None, 1, 20.0), (12.0, 8, 2.5)],
    ids=["measured", "not measured", "one at once", "resumed: the last part only"],
)
def test_the_machine_is_paid_for_the_whole_play(seconds, width, expected):
    run = Run("r", {}, {"width": width}, [{"wall_s": 20.0}] * 30, "", "", False, seconds=seconds)
    assert machine_seconds(run) == pytest.approx(expected)


def test_our_episode_is_priced_by_the_seconds_of_the_whole_play(project):
    table, prices = read_csv(efficiency(project, "out")), Prices(SHEET)
    ours = our_costs(table, prices, "two-cores")
    assert ours["each"] == pytest.approx(prices.hours("two-cores", 0.5))
    estimate = float(table.query("teacher == 'program'")["estimated_usd"].iloc[0])
    assert ours["once"] == pytest.approx(estimate + prices.hours("two-cores", 1800))
    paid = table.assign(annotation_usd="7.00")
    assert our_costs(paid, prices, "two-cores")["once"] - ours["once"] == pytest.approx(
        7 - estimate
    )


def test_the_title_counts_episodes_in_words(project):
    theirs = published_costs(REPORTED).assign(usd=[3.0, 4.0, 0.5, 0.001])
    said = paid_back({"once": 3.0, "each": 0.001}, theirs, "gpt-4")
    assert "after 1 episode of" in said and "no number of episodes of SwiftSage" in said


def test_the_table(project):
    table = read_csv(efficiency(project, "out"))
    assert list(table.columns) == EFFICIENCY
    ours = table[table["protocol"] == "paper"].set_index(["agent", "teacher"])
    hierarchical = ours.loc[("hierarchical", "program")]
    assert hierarchical["annotation_usd"] == "0.00" and hierarchical["annotated"] == "2"
    assert float(hierarchical["estimated_usd"]) > 0 and hierarchical["training_s"] == "1800"
    assert float(hierarchical["gflop"]) > 0 and hierarchical["llm_calls"] == "0.00"
    assert ours.loc[("flat", ""), "estimated_usd"] == "" != ours.loc[("flat", ""), "gflop"]
    assert ours.loc[("random", ""), "training_s"] == ""
    published = table[table["protocol"] == ""].set_index("agent")
    assert published.loc["SwiftSage", "tokens_per_action"] == "757.07"
    text = (project / "out" / "efficiency.md").read_text()
    assert "gpt-4" in text and "rule" in text and "primary" in text and "lower bound" in text


def test_the_footer_says_how_the_rows_were_played(project):
    efficiency(project, "out")
    text = (project / "out" / "efficiency.md").read_text()
    commit = sidecar(project / "runs" / "flat.s0.paper.jsonl.gz")["git"]["commit"]
    for said in (f"Protocol `paper`, hash `{SHA}`", "max_moves = 100", "Seeds: 0.", commit):
        assert said in text
    assert "Stand-in: teacher: program" in text and "not FLAN-T5" in text and "upper bound" in text
    assert "stale-code" not in text
    beside = project / "runs" / "flat.s0.paper.json"
    beside.write_text(beside.read_text().replace('"code_sha": "', '"code_sha": "old'))
    efficiency(project, "again")
    text = (project / "again" / "efficiency.md").read_text()
    assert "stale-code" in text and "flat.s0.paper.jsonl.gz" in text


def test_the_break_even_figure_names_its_stand_ins(project, monkeypatch):
    drawn = []
    monkeypatch.setattr("sgd.costs.save_figure", lambda figure, *rest: drawn.append(figure))
    efficiency(project, "out")
    print_ = drawn[0].get_supxlabel()
    assert "teacher: program = a labelling program" in print_ and "not FLAN-T5" in print_
    assert max(map(len, print_.splitlines())) <= 150


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "The efficiency table of simulated rows, built in a project and released there."
    home = make_project(tmp_path_factory.mktemp("costs") / "project")
    build = home / "build" / "cpu"
    kinds = {k: f"build/cpu/{k}" for k in ("rows", "oracle", "annotations", "students")}
    with chdir(home):
        write_runs(build / "rows")
        write_inputs(home, kinds, seeds=(0, 1))
        write_inputs(home, PLACES)
        (home / "data" / "prices.yaml").write_bytes(SHEET.read_bytes())
        example = read_jsonl(home / PLACES["annotations"] / "program.train.jsonl.gz")
        example = [row | {"variation": 1} for row in example]
        write_jsonl(home / PLACES["annotations"] / "exemplars.jsonl", example)
        places = [home / kinds[k] for k in ("oracle", "annotations", "students")]
        out = [build / "tables", build / "figures"]
        write_efficiency(build / "rows", REPORTED, *places, home / "data" / "prices.yaml", *out)
    return release(home)


def cost_again(home, column, files, sources, line):
    "A number of the efficiency table, computed anew from the files that its sources name."
    kinds = [s["folder"] for s in sources]
    told, cut = (
        [f for f, k in zip(files, kinds) if k == kind] for kind in ("oracle", "annotations")
    )
    if column.startswith("estimated"):
        examples = load_examples(
            *(home / "data" / n for n in ("annotations/exemplars.jsonl", "oracle/train.jsonl.gz"))
        )
        told, cut = told[:2], [c for c in cut if c.name != "exemplars.jsonl"]
        guess = annotation_estimate(told, cut, examples)
        usd = (
            Prices(files[-1]).tokens("gpt-4", guess["tokens_in"], guess["tokens_out"])
            if column.endswith("usd")
            else 0
        )
        return fixed(usd) if usd else str(guess[column.removeprefix("estimated_")])
    if column.startswith("annot"):
        spent = annotation_cost(cut)
        spent["tokens"], spent["annotated"] = (
            spent["tokens_in"] + spent["tokens_out"],
            spent["trajectories"],
        )
        value = spent[column.removeprefix("annotation_")]
        return fixed(value) if column.endswith("usd") else str(value)
    if column.startswith("training"):
        field = sources[0]["key"]["field"]
        return fixed(sum(read_json(f)[field] for f in files) / len(files), 0)
    rows = [read_jsonl(f) for f, k in zip(files, kinds) if k == "rows"]
    records = [sidecar(f) for f, k in zip(files, kinds) if k == "rows"]
    told = [r["facts"]["run"] for r in records]
    if column in ("seeds", "params", "episodes"):
        found = {"seeds": len({f["seed"] for f in told}), "params": told[0]["params"]}
        return str((found | {"episodes": sum(map(len, rows))})[column])
    if column == "machine_s":
        return fixed(sum(r["facts"]["seconds"] / len(x) for r, x in zip(records, rows)) / len(rows))
    shapes = [AutoConfig.from_pretrained(f.parent) for f, k in zip(files, kinds) if k == "students"]
    by_task = {}
    for row in (row for part in rows for row in part):
        row["gflop"] = episode_flops(row, shapes[:1]) / 1e9 if shapes else 0.0
        by_task.setdefault(row["task_id"], []).append(row)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    if column == "tokens_per_action":
        spent = [
            sum(r["tokens_in"] + r["tokens_out"] for r in part) / sum(r["actions"] for r in part)
            for part in by_task.values()
        ]
        return fixed(mean(spent))
    digits = {"score": 2, "llm_calls": 2, "gflop": 3}.get(column, 1)
    return fixed(mean([mean([r[column] for r in part]) for part in by_task.values()]), digits)


def test_every_number_resolves_to_its_source(released):
    "R16: file, key, commit and seed for all numbers; and the number is what the files say."
    provenance = read_json(released / PLACES["tables"] / "efficiency.provenance.json")
    seen = set()
    for line in read_csv(released / PLACES["tables"] / "efficiency.csv").to_dict("records"):
        for column in [c for c, v in line.items() if re.fullmatch(r"-?\d+(\.\d+)?", v)]:
            sources = resolve_cost(provenance, line, column)
            files = [locate(source, released) for source in sources]
            assert files and not any("build" in f.parts for f in files)
            if line["protocol"] == "":
                key, table = sources[0]["key"], read_csv(files[0])
                hits = table[(table[[*key]] == list(key.values())).all(axis=1)]
                assert hits[hits["confidence"] != "derived"]["value"].tolist() == [line[column]]
                continue
            known = [s for s in sources if s["name"] not in ("exemplars.jsonl", "prices.yaml")]
            assert all(re.fullmatch("[0-9a-f]{40}", s["commit"]) for s in known)
            played = [s for s in sources if s["name"].endswith(".paper.jsonl.gz")]
            assert {s["protocol"] for s in played} <= {SHA} and all(
                s["seed"] in (0, 1) for s in played
            )
            assert cost_again(released, column, files, sources, line) == line[column], (
                line,
                column,
            )
            seen.add(column)
    assert set(EFFICIENCY[8:]) <= seen


def test_the_same_input_gives_the_same_bytes(project):
    for out in ("one", "two"):
        efficiency(project, out)
    names = ["efficiency.csv", "efficiency.md", "efficiency.provenance.json"] + [
        f"break_even.{k}" for k in ("csv", "png", "svg")
    ]
    for name in names:
        assert file_sha(project / "one" / name) == file_sha(project / "two" / name), name
    svg = (project / "one" / "break_even.svg").read_text()
    assert "<dc:date>" not in svg


def test_missing_students_leave_cells_empty(project):
    config = project / "students" / "flat.s0" / "config.json"
    assert json.loads(config.read_text())["model_type"] == "lfm2"
    config.unlink()
    table = read_csv(efficiency(project, "out")).set_index(["agent", "teacher"])
    assert table.loc[("flat", ""), "gflop"] == "" != table.loc[("hierarchical", "program"), "gflop"]
