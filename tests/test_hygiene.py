"""R15: test data stay out of training, oracle paths out of play, and the tasks' names out of the code."""

import ast
import json
import re
from pathlib import Path

import pytest
import scienceworld

import sgd
from sgd.files import sidecar
from sgd.world import SPLITS, Protocol, tasks, variations

GENERAL = ("layouts", "students", "agents", "rollout")
PLAY = ("agents", "rollout", "layouts", "students")
# Classes of the simulator whose names are also words of programming or of the design.
COMMON = {"agent", "counter", "device", "room"}


def source(module: str) -> str:
    "The text of a module."
    return (Path(sgd.__file__).parent / f"{module}.py").read_text()


def spoken(name: str) -> str:
    "A class name of the simulator as words: FlowerPot -> flower pot."
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def names() -> set[str]:
    "Tasks, rooms and objects, as the simulator's own lists name them."
    folder = Path(scienceworld.__file__).parent
    listed = [line.split("\t")[0] for line in open(folder / "object_type_ids.tsv")]
    objects = {spoken(cls.split(".")[-1].split("$")[0]) for cls in listed if cls.strip()}
    known = {t["task_name"] for t in json.loads((folder / "tasks.json").read_text())}
    rooms = {"kitchen", "bathroom", "living room", "bedroom", "hallway", "workshop", "art studio"}
    rooms |= {"greenhouse", "outside", "foundry"}
    return {n for n in objects | known | rooms if len(n) > 3} - COMMON


def found(module: str) -> list[str]:
    "The names that occur in a module, docstrings and comments included."
    text = source(module).lower()
    return sorted(n for n in names() if re.search(rf"(?<![a-z_]){re.escape(n)}(?![a-z_])", text))


def test_the_splits_of_every_task_are_disjoint_and_complete():
    for t in tasks():
        sets = [set(variations(t.name, s)) for s in SPLITS]
        assert sum(map(len, sets)) == len(set().union(*sets)) == t.train + t.dev + t.test


def test_the_released_trajectories_are_of_their_split(released):
    for split, rows in released.items():
        assert {t["split"] for t in rows} == {split}
        assert all(t["variation"] in variations(t["task"], split) for t in rows)


def test_selection_and_play_use_different_splits(oracle_folder):
    assert Protocol().split == "test"
    for split in ("train", "dev"):
        assert sidecar(oracle_folder / f"{split}.jsonl.gz")["params"]["split"] == split


@pytest.mark.parametrize("module", GENERAL)
def test_no_task_room_or_object_is_named_in_general_code(module):
    assert len(names()) > 200
    assert found(module) == []


def test_the_search_for_names_finds_names(monkeypatch):
    monkeypatch.setitem(globals(), "source", lambda _: 'if "Find-Animal" in x: go("flower pot")')
    assert {"find-animal", "flower pot"} <= set(found("agents"))


def called(module: str) -> set[str]:
    "All names and attributes that a module uses, and all its short strings."
    out = set()
    for node in ast.walk(ast.parse(source(module))):
        out |= {getattr(node, k) for k in ("id", "attr", "name") if hasattr(node, k)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            out.add(node.value)
    return {x for x in out if isinstance(x, str)}


@pytest.mark.parametrize("module", PLAY)
def test_play_never_makes_an_oracle_path(module):
    banned = {"gold_path", "generateGoldPath", "getGoldActionSequence", "goal_progress"}
    assert not {x for x in called(module) if any(b in x for b in banned)}
    assert "gold=" not in source(module).replace(" ", "")


def test_a_playing_simulator_loads_without_an_oracle_path():
    calls = [
        n
        for n in ast.walk(ast.parse(source("world")))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "partial"
        if ast.unparse(n.args[0]) == "_load"
    ]
    assert sorted(ast.unparse(c.args[-1]) for c in calls) == ["False", "True"]


def test_only_the_oracles_row_opens_test_paths():
    for module in ("training", "students", "agents", "layouts"):
        assert "oracle_row" not in called(module)
    assert source("rollout").count("oracle_row") == 1
