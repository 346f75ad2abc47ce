"""The hand-made annotations fit the released paths, step by step, and say what the steps do."""

import re

import pytest

from sgd.files import read_jsonl, root
from sgd.llm_teachers import choose, load_examples
from sgd.prompts import FORMATS, answer_text
from sgd.subgoals import align, parse_answer
from sgd.world import tasks

ROWS = read_jsonl(root() / "data/annotations/exemplars.jsonl")
PHRASE = re.compile(r"([a-z_]+)\(([^()]+)\)")
FIRST = {  # what the first action of a sub-goal looks like
    "navigate_to": "open door to |go to ",
    "pick_up": "pick up ",
    "put_down": "drop |put down ",
    "focus_on": "focus on ",
    "measure": "use thermometer ",
    "monitor_temperature": "examine |use thermometer ",
    "build_circuit": "connect ",
    "test_conductivity": "connect ",
    "pour": "pour ",
    "wait_for": "wait",
    "watch": "look at ",
}
LAST = FIRST | {
    "navigate_to": "go to ",
    "monitor_temperature": "examine |use thermometer |wait",
    "test_conductivity": "wait",
    "heat": "activate (stove|blast furnace)",
    "cool": "move .* to (freezer|fridge)",
    "place_in": "move .* to ",
    "plant": "move .* seed .* to ",
    "water": "deactivate sink",
    "mix": "mix ",
    "read": "read ",
    "start_timing": "activate stopwatch",
    "stop_timing": "examine stopwatch",
}


@pytest.fixture(scope="module")
def train(oracle_folder) -> dict[tuple, dict]:
    "Released train trajectories by task and variation."
    rows = read_jsonl(oracle_folder / "train.jsonl.gz")
    return {(t["task"], t["variation"]): t for t in rows}


@pytest.fixture(params=ROWS, ids=lambda row: row["task"])
def pair(request, train) -> tuple[dict, dict]:
    "An exemplar with its trajectory."
    row = request.param
    assert (row["task"], row["variation"]) in train, "the exemplar's path is not in the release"
    return row, train[row["task"], row["variation"]]


def text_of(trajectory: dict) -> str:
    "Everything an annotator could read, in lower case."
    parts = [trajectory["description"], *trajectory["init"].values()]
    for step in trajectory["steps"]:
        parts += [step["action"], step["observation"], step["look"]]
    return " ".join("\n".join(parts).lower().split())


def test_one_for_each_task_in_the_order_of_the_tasks():
    assert [row["task"] for row in ROWS] == [t.name for t in tasks()]


def test_each_row_has_the_schema_and_says_it_is_an_exemplar():
    for row in ROWS:
        assert list(row) == [
            *("task", "variation", "teacher", "model", "prompt_sha"),
            *("segments", "report", "usage"),
        ]
        assert (row["teacher"], row["model"], row["prompt_sha"]) == ("exemplar", "", "")
        assert all(list(s) == ["subgoal", "first", "last"] for s in row["segments"])
        assert row["report"] == {
            "kept": row["segments"][-1]["last"] + 1,
            **dict.fromkeys(("inserted", "dropped", "reasked"), 0),
        }
        assert row["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}


def test_it_covers_its_path_exactly(pair):
    row, trajectory = pair
    covered = [n for s in row["segments"] for n in range(s["first"], s["last"] + 1)]
    assert covered == list(range(len(trajectory["steps"])))
    assert all(s["first"] <= s["last"] for s in row["segments"])


def test_its_path_solves_the_task_in_every_replay(pair):
    _, trajectory = pair
    assert trajectory["split"] == "train" and trajectory["score"] == 100
    assert all(replay["score"] == 100 for replay in trajectory["replays"])


def test_its_subgoals_name_what_can_be_read_in_the_path(pair):
    row, trajectory = pair
    text = text_of(trajectory)
    for segment in row["segments"]:
        _, arguments = PHRASE.fullmatch(segment["subgoal"]).groups()
        assert all(name.lower() in text for name in arguments.split(", ")), segment


def test_its_subgoals_begin_and_end_with_the_actions_they_promise(pair):
    row, trajectory = pair
    actions = [step["action"] for step in trajectory["steps"]]
    for segment in row["segments"]:
        name, arguments = PHRASE.fullmatch(segment["subgoal"]).groups()
        assert re.match(FIRST.get(name, ""), actions[segment["first"]]), segment
        assert re.match(LAST.get(name, ""), actions[segment["last"]]), segment
        if name == "navigate_to":
            assert actions[segment["last"]] == f"go to {arguments}", segment
        if name == "focus_on":
            assert segment["first"] == segment["last"], segment


def test_two_neighbours_never_share_a_subgoal():
    for row in ROWS:
        names = [s["subgoal"] for s in row["segments"]]
        assert all(a != b for a, b in zip(names, names[1:])), row["task"]


@pytest.mark.parametrize("format", FORMATS)
def test_as_an_answer_it_is_read_back_whole(pair, format):
    row, trajectory = pair
    actions = [step["action"] for step in trajectory["steps"]]
    segments = [tuple(s.values()) for s in row["segments"]]
    answer = answer_text(actions, segments, format)
    assert [tuple(s) for s in align(actions, parse_answer(answer))[0]] == segments


def test_an_example_of_the_prompt_is_never_asked_for(oracle_folder, train):
    examples = load_examples(trajectories=oracle_folder / "train.jsonl.gz")
    assert set(examples) == {t.name for t in tasks()}
    asked = {(t["task"], t["variation"]) for t in choose(list(train.values()), examples=examples)}
    assert asked == set(train) - {(row["task"], row["variation"]) for row in ROWS}


def test_the_card_counts_what_is_there():
    segments = [s for row in ROWS for s in row["segments"]]
    names = {PHRASE.fullmatch(s["subgoal"])[1] for s in segments}
    steps = sum(row["report"]["kept"] for row in ROWS)
    said = f"{len(ROWS)} rows, {len(segments)} segments, {steps:,} steps, {len(names)} verbs"
    assert said in (root() / "data/annotations/CARD.md").read_text()
