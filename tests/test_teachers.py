"""Annotations cover their paths exactly, name what was seen, and are never lost or made twice."""

import re
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgd.files import read_json, read_jsonl, sidecar, write_jsonl
from sgd.subgoals import Refused, Segment
from sgd.teachers import (
    TEACHERS,
    ProgramTeacher,
    RandomTeacher,
    Seen,
    Teacher,
    annotate,
    annotation,
    make_teacher,
)

PHRASE = re.compile(r"[a-z_]+\((?:[^()]|\([^()]*\))*\)")  # a book is called `book (Moby Dick)`


def name(segment: dict) -> str:
    return segment["subgoal"].partition("(")[0]


@pytest.fixture(scope="module")
def labels(released):
    "Every released path with its annotation by the program."
    teacher = ProgramTeacher()
    return [(t, teacher.annotate(t)) for rows in released.values() for t in rows]


@pytest.fixture(scope="module")
def segments(labels):
    return [s for _, row in labels for s in row["segments"]]


@pytest.mark.parametrize("teacher", ["program", "random"])
def test_every_released_path_is_covered_exactly(released, teacher):
    teacher = make_teacher(teacher)
    for t in [t for rows in released.values() for t in rows]:
        row = teacher.annotate(t)
        flat = [i for s in row["segments"] for i in range(s["first"], s["last"] + 1)]
        assert flat == list(range(len(t["steps"])))
        assert row["report"]["kept"] == len(t["steps"])


def test_the_program_is_deterministic_and_has_no_memory(labels):
    "A fresh teacher, and another order, give the same annotations."
    again = ProgramTeacher()
    for t, row in reversed(labels):
        assert again.annotate(t) == row


def test_the_program_looks_at_no_task_name(labels):
    "The same path under another name is cut the same."
    teacher = ProgramTeacher()
    for t, row in labels:
        hidden = {**t, "task": "hidden", "task_id": "0-0", "variation": 0, "score": 0}
        assert teacher.annotate(hidden)["segments"] == row["segments"]


def test_phrases_are_short_functions_of_a_small_vocabulary(segments):
    assert all(PHRASE.fullmatch(s["subgoal"]) for s in segments)
    assert len({name(s) for s in segments}) <= 30
    assert max(len(s["subgoal"].split()) for s in segments) <= 12


def test_lengths_are_those_of_subgoals(segments, labels):
    "Short, but not one action each; many a path."
    lengths = [s["last"] - s["first"] + 1 for s in segments]
    assert 2 <= median(lengths) <= 8
    assert sum(n == 1 for n in lengths) < len(lengths) / 2
    assert median(len(row["segments"]) for _, row in labels) >= 5


def test_arguments_are_copied_from_what_was_read(labels):
    "Nineteen of twenty argument words stood in the text before the sub-goal began."
    known = total = 0
    for t, row in labels:
        seen = Seen(t)
        for s in row["segments"]:
            words = re.findall(r"[\w-]+", s["subgoal"].partition("(")[2].lower())
            read = set(re.findall(r"[\w-]+", seen.lower[: seen.ends[s["first"]]]))
            known, total = known + sum(w in read for w in words), total + len(words)
    assert known >= 0.95 * total


def test_seen_never_looks_ahead(one_each):
    "What is read before a step is exactly the text of the steps before it."
    for t in one_each.values():
        seen = Seen(t)
        for i in range(0, len(t["steps"]), 7):
            short = Seen({**t, "steps": t["steps"][:i]})
            assert seen.text[: seen.ends[i]] == short.text[: short.ends[i]]


def test_walking_ends_in_the_room_it_names(labels):
    for t, row in labels:
        for s in row["segments"]:
            steps = t["steps"][s["first"] : s["last"] + 1]
            if name(s) == "navigate_to" and steps[-1]["action"].startswith("go to"):
                assert s["subgoal"] == f"navigate_to({steps[-1]['action'][6:]})"
            gone = [x for x in steps if x["action"].startswith("go to")]
            assert name(s) == "navigate_to" or not gone


def test_focus_is_always_a_subgoal_of_its_own(labels):
    "Focusing decides the score, so no other sub-goal hides it."
    for t, row in labels:
        owner = {i: s for s in row["segments"] for i in range(s["first"], s["last"] + 1)}
        for i, step in enumerate(t["steps"]):
            if step["action"].startswith("focus on"):
                assert name(owner[i]) == "focus_on" and owner[i]["first"] == i


def test_a_path_cut_short_is_still_covered(one_each):
    "The simulator may end a path anywhere."
    teacher = ProgramTeacher()
    for t in one_each.values():
        for n in range(1, len(t["steps"]), 5):
            row = teacher.annotate({**t, "steps": t["steps"][:n]})
            assert row["segments"][-1]["last"] == n - 1


ACTIONS = st.sampled_from(
    "open door to a,go to a,open b,close b,pick up c,pick up seed jar,drop c,focus on c,wait1,wait,0,1,"
    "move c to sink,move seed to pot,move c to b,move c to freezer,activate sink,activate stove,"
    "activate b,activate stopwatch,deactivate sink,deactivate stopwatch,pour c into c,pour c in b,"
    "pour jug into flower pot 1,mix c,mix cup containing a and b,examine c,look at c,read c,"
    "use thermometer on c,use shovel on ground,connect c terminal 1 to d wire terminal 2,"
    "connect battery anode to d wire terminal 1,open bee hive,eat c,flush c,dunk c into b,"
    "teleport to a,disconnect c,sing,move (c to b,inventory,task".split(",")
)
SAID = st.sampled_from(
    ["", "You move the c to the b.", "You focus on the c.", "No known action matches that input."]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(ACTIONS, SAID), min_size=1, max_size=40), st.integers(0, 99))
def test_any_path_is_covered(steps, seed):
    "Even nonsense: the rules never fail, and `annotation` checks the cover."
    look = {"look": "This room is called the a.\n\ta c", "inventory": "In your inventory:\n\ta c"}
    steps = [{"action": a, "observation": o, **look} for a, o in steps]
    t = {"task": "any", "variation": seed, "description": "c", "init": look, "steps": steps}
    rows = [teacher.annotate(t) for teacher in (ProgramTeacher(), RandomTeacher(seed))]
    assert all(row["segments"][-1]["last"] == len(steps) - 1 for row in rows)


def test_the_random_control_is_matched(one_each):
    "As many, as long, the same phrases; other seeds, other places."
    places = names = seeds = 0
    for t in one_each.values():
        true, mixed = (make_teacher(n).segments(t) for n in ("program", "random"))
        assert sorted(s.last - s.first for s in mixed) == sorted(s.last - s.first for s in true)
        assert sorted(s.subgoal for s in mixed) == sorted(s.subgoal for s in true)
        places += [s.last for s in mixed] != [s.last for s in true]
        names += [s.subgoal for s in mixed] != [s.subgoal for s in true]
        seeds += RandomTeacher(seed=1).segments(t) != mixed
    assert min(places, names, seeds) > len(one_each) / 2


@pytest.mark.parametrize(
    "cut", [[], [(0, 1)], [(0, 1), (1, 2)], [(0, 0), (2, 2)], [(1, 2)], [(0, 3)], [(0, 2), (3, 2)]]
)
def test_an_annotation_with_gaps_or_overlaps_is_refused(cut):
    t = {"task": "boil", "variation": 0, "steps": [{}, {}, {}]}
    with pytest.raises(ValueError, match="cover 3 steps"):
        annotation(t, Teacher(), [Segment("a()", *c) for c in cut], {}, {})


class Counting(Teacher):
    "Counts whom it was asked for, refuses some, and may fall over."

    name = "counting"

    def __init__(self, refuse=(), fall=None):
        self.asked, self.refuse, self.fall = [], refuse, fall

    def segments(self, trajectory):
        key = trajectory["task"], trajectory["variation"]
        if len(self.asked) == self.fall:
            raise KeyboardInterrupt
        self.asked.append(key)
        if key[0] in self.refuse:
            raise Refused("foreign", "not my path")
        return [Segment("do_it()", 0, len(trajectory["steps"]) - 1)]


@pytest.fixture
def paths(one_each, tmp_path):
    return write_jsonl(tmp_path / "train.jsonl.gz", [one_each[t] for t in sorted(one_each)[:12]])


def test_the_stage_goes_on_where_it_fell(paths, tmp_path):
    "Each path is annotated once over an interrupted run and the next; a torn row is made again."
    out, first = tmp_path / "notes.jsonl.gz", Counting(fall=5)
    with pytest.raises(KeyboardInterrupt):
        annotate(paths, out, first)
    assert not out.exists()
    part = out.with_name(out.name + ".part")
    part.write_bytes(part.read_bytes()[:-9])
    second = Counting()
    annotate(paths, out, second)
    assert len(first.asked) == 5 and len(second.asked) == len(read_jsonl(paths)) - 4
    assert len(read_jsonl(out)) == len(read_jsonl(paths))
    assert not part.exists()


def test_a_finished_stage_asks_nobody(paths, tmp_path):
    out = annotate(paths, tmp_path / "notes.jsonl.gz", Counting())
    idle = Counting()
    annotate(paths, out, idle)
    assert idle.asked == []
    out.write_bytes(out.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="made again"):
        annotate(paths, out, idle)
    assert len(idle.asked) == len(read_jsonl(paths)) == len(read_jsonl(out))


def test_other_paths_or_another_teacher_are_annotated_anew(paths, tmp_path):
    out = tmp_path / "notes.jsonl.gz"
    annotate(paths, out, "program")
    annotate(paths, out, "random", seed=3)
    assert {r["teacher"] for r in read_jsonl(out)} == {"random"}
    fewer = write_jsonl(tmp_path / "fewer.jsonl.gz", read_jsonl(paths)[:3])
    annotate(fewer, out, "random", seed=3)
    assert len(read_jsonl(out)) == 3


@pytest.mark.filterwarnings("ignore:.*begun with other parameters")
def test_rows_of_other_paths_are_not_mixed_in(paths, tmp_path):
    "An unfinished file of a first collection, then the same variations with other steps."
    out = tmp_path / "notes.jsonl.gz"
    with pytest.raises(KeyboardInterrupt):
        annotate(paths, out, Counting(fall=5))
    short = [{**t, "steps": t["steps"][:2]} for t in read_jsonl(paths)]
    annotate(write_jsonl(tmp_path / "short.jsonl.gz", short), out, Counting())
    assert {r["segments"][-1]["last"] for r in read_jsonl(out)} == {1}


def test_refusals_are_counted_with_their_reason(paths, tmp_path):
    out = annotate(paths, tmp_path / "notes.jsonl.gz", Counting(refuse=("boil", "freeze")))
    facts = sidecar(out)["facts"]
    assert facts["annotated"] == len(read_jsonl(paths)) - 2
    assert [(r["task"], r["reason"]) for r in facts["refused"]] == [
        ("boil", "foreign"),
        ("freeze", "foreign"),
    ]


def test_two_runs_write_the_same_bytes(paths, tmp_path):
    a = annotate(paths, tmp_path / "a.jsonl.gz", "random", seed=1)
    b = annotate(paths, tmp_path / "b.jsonl.gz", "random", seed=1)
    assert a.read_bytes() == b.read_bytes()
    assert read_json(tmp_path / "a.json")["seed"] == 1


def test_test_paths_stay_closed(tmp_path):
    with pytest.raises(ValueError, match="expected train or dev"):
        annotate(tmp_path / "test.jsonl.gz", tmp_path / "notes.jsonl.gz")


def test_an_unknown_teacher_is_named():
    with pytest.raises(ValueError, match="got 'oracle'"):
        make_teacher("oracle")
    assert {"program", "random"} <= set(TEACHERS)
