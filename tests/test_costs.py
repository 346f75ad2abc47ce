"""Costs: FLOPs agree with a counter that watches the forward pass; money adds up; published numbers stay as they are."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
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
    published_costs,
    write_efficiency,
)
from sgd.files import file_sha, root, write_json, write_jsonl
from sgd.output import read_csv

sys.path.insert(0, str(Path(__file__).parent))
from simulated import write_runs  # noqa: E402

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


@pytest.fixture
def project(tmp_path):
    "Simulated rows with trajectories, annotations, students and training records."
    write_runs(tmp_path / "runs", seeds=(0,))
    steps = [{"action": a} for a in ("open door to kitchen", "go to kitchen", "pick up pot")]
    path = {"task": "find-plant", "variation": 0, "description": "Find a plant.", "steps": steps}
    segments = [
        {"subgoal": "navigate_to(kitchen)", "first": 0, "last": 1},
        {"subgoal": "pick_up(pot)", "first": 2, "last": 2},
    ]
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    row = {"task": "find-plant", "variation": 0, "segments": segments, "usage": usage}
    for split in ("train", "dev"):
        write_jsonl(tmp_path / "oracle" / f"{split}.jsonl.gz", [path])
        for teacher in ("program", "random"):
            write_jsonl(tmp_path / "annotations" / f"{teacher}.{split}.jsonl.gz", [row])
    for name in ("flat.s0", "hierarchical-program.s0", "hierarchical-random.s0"):
        LFM2.save_pretrained(tmp_path / "students" / name)
        record = {"seconds": 1800.0, "tokens_seen": 10**6}
        write_json(tmp_path / "runs" / f"{name}.training.json", record)
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
    }
    guess = annotation_estimate([project / "oracle" / "train.jsonl.gz"], files)
    assert guess["tokens_in"] > guess["tokens_out"] > 10 and "letters" in guess["rule"]


def test_a_paid_teacher_is_billed_as_it_says(tmp_path):
    usage = {"prompt_tokens": 900, "completion_tokens": 80, "cost": 0.0318}
    write_jsonl(tmp_path / "llm.train.jsonl.gz", [{"usage": usage}, {"usage": usage}])
    spent = annotation_cost([tmp_path / "llm.train.jsonl.gz"])
    assert (spent["tokens_in"], spent["tokens_out"]) == (1800, 160)
    assert spent["usd"] == pytest.approx(0.0636)


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


def test_the_same_input_gives_the_same_bytes(project):
    for out in ("one", "two"):
        efficiency(project, out)
    names = ["efficiency.csv", "efficiency.md"] + [f"break_even.{k}" for k in ("csv", "png", "svg")]
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
