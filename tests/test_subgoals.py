"""Whatever a teacher answers becomes segments that cover the path, or a refusal with a reason."""

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgd.subgoals import (
    Refused,
    Segment,
    Stated,
    align,
    formal,
    lcs,
    parse_answer,
    raw,
    render,
    split_actions,
    stretches,
)

PATH = [
    "open door to kitchen",
    "go to kitchen",
    "open cupboard",
    "pick up metal pot",
    "wait1",
    "wait1",
]
WANTED = [
    Segment("navigate_to(kitchen)", 0, 1),
    Segment("find(metal pot)", 2, 3),
    Segment("wait(2)", 4, 5),
]
WORDS = ["open door to kitchen", "go to kitchen", "wait1", "0", "examine ice", "look at box"]


def covers(segments, n: int) -> bool:
    "Do the segments cover n steps exactly, in order?"
    flat = [i for s in segments for i in range(s.first, s.last + 1)]
    return flat == list(range(n)) and all(s.first <= s.last and s.subgoal for s in segments)


def cut(n: int, rng: random.Random) -> list[Segment]:
    "A random cut of n steps into named segments."
    ends = sorted(rng.sample(range(1, n), min(n - 1, n // 4))) + [n]
    return [Segment(f"do(part {a})", a, b - 1) for a, b in zip([0, *ends], ends)]


ZOO = {
    "the paper's": "1- navigate_to(kitchen) : {'open door to kitchen', 'go to kitchen'} "
    "2- find(metal pot):{'open cupboard', 'pick up metal pot'} 3- wait(2): {'wait1', 'wait1'}",
    "dots": "1. navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'}\n"
    "2. find(metal pot): {'open cupboard', 'pick up metal pot'}\n3. wait(2): {'wait1', 'wait1'}",
    "parentheses and lists": "1) navigate_to(kitchen): ['open door to kitchen', 'go to kitchen']\n"
    "2) find(metal pot): ['open cupboard', 'pick up metal pot']\n3) wait(2): ['wait1', 'wait1']",
    "no numbers, double quotes": 'navigate_to(kitchen): {"open door to kitchen", "go to kitchen"}\n'
    'find(metal pot): {"open cupboard", "pick up metal pot"}\nwait(2): {"wait1", "wait1"}',
    "curly quotes": "1- navigate_to(kitchen): {‘open door to kitchen’, ‘go to kitchen’} "
    "2- find(metal pot): {“open cupboard”, “pick up metal pot”} 3- wait(2): {«wait1», «wait1»}",
    "back ticks": "1- `navigate_to(kitchen)`: {`open door to kitchen`, `go to kitchen`}\n"
    "2- `find(metal pot)`: {`open cupboard`, `pick up metal pot`}\n3- `wait(2)`: {`wait1`, `wait1`}",
    "fence and prose": "Here you go:\n```json\n1- navigate_to(kitchen): {'open door to kitchen', "
    "'go to kitchen'}\n2- find(metal pot): {'open cupboard', 'pick up metal pot'}\n"
    "3- wait(2): {'wait1', 'wait1'}\n```\nHope {this} helps (a lot)!",
    "bullets": "**1. navigate_to(kitchen)**:\n- open door to kitchen\n- go to kitchen\n\n"
    "**2. find(metal pot)**:\n- open cupboard\n- pick up metal pot\n\n**3. wait(2)**:\n- wait1 x2\n",
    "headings": "### 1. navigate_to(kitchen)\n\n- open door to kitchen\n- go to kitchen\n\n"
    "### 2. find(metal pot)\n\n- open cupboard\n- pick up metal pot\n\n"
    "### 3. wait(2)\n\n- wait1\n- wait1\n\nDone.",
    "numbered actions": "1. navigate_to(kitchen):\n 1. open door to kitchen\n 2. go to kitchen\n"
    "2. find(metal pot):\n 3. open cupboard\n 4. pick up metal pot\n3. wait(2):\n 5. wait1\n 6. wait1",
    "no quotes": "1- navigate_to(kitchen): {open door to kitchen, go to kitchen} "
    "2- find(metal pot): {open cupboard, pick up metal pot} 3- wait(2): {wait1, wait1}",
    "no brackets": "1. navigate_to(kitchen): 'open door to kitchen', 'go to kitchen'\n"
    "2. find(metal pot): 'open cupboard', 'pick up metal pot'\n3. wait(2): 'wait1', 'wait1'",
    "capitals": "1- Navigate_To(kitchen): {'Open door to kitchen', 'Go to kitchen.'} "
    "2- Find(metal pot): {'Open cupboard', 'Pick up metal pot'} 3- Wait(2): {'Wait1', 'Wait1'}",
    "functions": "1- navigate_to(kitchen): {open_door(kitchen), go_to(kitchen)} "
    "2- find(metal pot): {open(cupboard), pick_up(metal pot)} 3- wait(2): {wait1, wait1}",
    "JSON": '[{"subgoal":"navigate_to(kitchen)","actions":["open door to kitchen","go to kitchen"]},'
    '{"subgoal":"find(metal pot)","actions":["open cupboard","pick up metal pot"]},'
    '{"subgoal":"wait(2)","actions":["wait1","wait1"]}]',
    "JSON object": '{"navigate_to(kitchen)": ["open door to kitchen", "go to kitchen"], '
    '"find(metal pot)": ["open cupboard", "pick up metal pot"], "wait(2)": ["wait1", "wait1"]}',
    "JSON spans": '```json\n[{"subgoal":"navigate_to(kitchen)","first":1,"last":2},'
    '{"subgoal":"find(metal pot)","first":3,"last":4},{"subgoal":"wait(2)","start":5,"last":6}]\n```',
    "comments": "1- navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'} (it moves) "
    "2- find(metal pot): {'open cupboard', 'pick up metal pot'} (the pot) "
    "3- wait(2): {'wait1', 'wait1'} (done)",
    "arrows": "1. navigate_to(kitchen) = {'open door to kitchen', 'go to kitchen'}\n"
    "2. find(metal pot) -> {'open cupboard', 'pick up metal pot'}\n3. wait(2) → {'wait1', 'wait1'}",
    "cut off": "1- navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'} "
    "2- find(metal pot): {'open cupboard', 'pick up metal pot'} 3- wait(2): {'wait1', 'wai",
    "missing": "1- navigate_to(kitchen): {'go to kitchen'} "
    "2- find(metal pot): {'open cupboard', 'pick up metal pot'} 3- wait(2): {'wait1'}",
    "extra": "1- navigate_to(kitchen): {'open door to kitchen', 'look around', 'go to kitchen'} "
    "2- find(metal pot): {'open cupboard', 'pick up metal pot', 'dance'} "
    "3- wait(2): {'wait1', 'wait1', 'wait1'}",
    "swapped": "1- navigate_to(kitchen): {'go to kitchen', 'open door to kitchen'} "
    "2- find(metal pot): {'pick up metal pot', 'open cupboard'} 3- wait(2): {'wait1', 'wait1'}",
    "paraphrased": "1- navigate_to(kitchen): {'open the kitchen door', 'walk to the kitchen'} "
    "2- find(metal pot): {'open the cupboard', 'take metal pot'} 3- wait(2): {'wait1', 'wait1'}",
    "spans": "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n3. wait(2): 5-6",
    "spans in a line": "1. navigate_to(kitchen): 1–2 2. find(metal pot): 3–4 3. wait(2): 5–6",
    "spans bare": "navigate_to(kitchen) 1-2\nfind(metal pot) 3-4\nwait(2) 5-6",
    "spans in lists": "Step 1: navigate_to(kitchen) [1, 2]\nStep 2: find(metal pot) [3, 4]\n"
    "Step 3: wait(2) [5, 6]",
    "spans in words": "1. navigate_to(kitchen) (steps 1 to 2)\n2. find(metal pot): Steps 3, 4\n"
    "3. wait(2): step 5 through 6",
    "spans in a table": "| # | sub-goal | steps |\n|---|---|---|\n| 1 | navigate_to(kitchen) | 1-2 |\n"
    "| 2 | find(metal pot) | 3-4 |\n| 3 | wait(2) | 5-6 |",
    "spans from 0": "1. navigate_to(kitchen): 0-1\n2. find(metal pot): 2-3\n3. wait(2): 4-5",
    "spans out of order": "1. find(metal pot): 3-4\n2. navigate_to(kitchen): 1-2\n3. wait(2): 6-5",
    "spans overlapping": "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 2-4\n3. wait(2): 4-99",
    "thinking aloud": "<think>First the agent goes (quickly): it opens the door.</think>\n"
    "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n3. wait(2): 5-6\n",
    "both formats": "1. navigate_to(kitchen): 1-2\n2. find(metal pot): {'open cupboard', "
    "'pick up metal pot'}\n3. wait(2): 5-6",
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    "Every dress the answer may wear ends in the same three segments."
    assert align(PATH, parse_answer(ZOO[name]))[0] == WANTED


REFUSALS = {
    "empty text": ("", "unreadable"),
    "none": (None, "unreadable"),
    "an apology": ("I am sorry, I cannot do that.", "unreadable"),
    "heads without bodies": ("1. navigate_to(kitchen)\n2. find(metal pot)\n", "unreadable"),
    "another path": ("1- eat(cake): {'eat cake', 'eat more cake', 'flush toilet'}", "foreign"),
    "half a span": ("1. navigate_to(kitchen): 1-2", "foreign"),
    "spans of nothing": ("1. navigate_to(kitchen): 90-99", "foreign"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    "What cannot be read, or is about something else, is refused with its reason."
    text, reason = REFUSALS[name]
    with pytest.raises(Refused) as e:
        align(PATH, parse_answer(text))
    assert e.value.reason == reason


def test_empty_path_is_refused():
    with pytest.raises(Refused, match="at least one action"):
        align([], parse_answer(ZOO["spans"]))


def test_commas_braces_and_apostrophes_inside_actions():
    actions = ("mix cup, the blue one", "look in {box}", "read chef's note", "0")
    assert split_actions("{" + ", ".join(f"'{a}'" for a in actions) + "}") == actions


def test_parentheses_inside_a_phrase():
    path, phrase = ["focus on book (moby dick)", "wait1"], "focus_on(book (Moby Dick))"
    for style in ("verbatim", "spans"):
        text = render(path, [Segment(phrase, 0, 0), Segment("wait()", 1, 1)], style)
        assert [s.subgoal for s in align(path, parse_answer(text))[0]] == [phrase, "wait()"]


def test_over_a_hundred_subgoals():
    path = [f"step {i}" for i in range(450)]
    segments = [Segment(f"do(part {i})", 3 * i, 3 * i + 2) for i in range(150)]
    for style in ("verbatim", "spans"):
        assert align(path, parse_answer(render(path, segments, style)))[0] == segments


def test_reject_refuses_a_gap():
    gappy = parse_answer("1. navigate_to(kitchen): 1-2 2. wait(2): 5-6")
    with pytest.raises(Refused, match="2 are in none") as e:
        align(PATH, gappy, "reject")
    assert e.value.reason == "missing"
    inside = "1- get(metal pot): {'open door to kitchen', 'pick up metal pot'} 2- wait(2): {'wait1', 'wait1'}"
    assert [s.last for s in align(PATH, parse_answer(inside), "reject")[0]] == [3, 5]


def test_reask_asks_for_each_stretch_and_no_more_than_allowed():
    path = [f"act {i}" for i in range(20)]
    holes = parse_answer("\n".join(f"{i}. do(part {i}): {4 * i + 1}-{4 * i + 2}" for i in range(5)))
    asked = []

    def ask(s):
        asked.append(s)
        return f"1. more({s.first}): 1-{len(s.actions)}"

    segments, report = align(path, holes, "reask", ask, most=3)
    assert [s.first for s in asked] == [2, 6, 10] and report["reasked"] == 3
    assert asked[0].actions == ("act 2", "act 3")
    assert (asked[0].before, asked[0].after) == ("do(part 0)", "do(part 1)")
    assert [s.subgoal for s in segments if s.subgoal.startswith("more")] == [
        "more(2)",
        "more(6)",
        "more(10)",
    ]
    assert covers(segments, 20)


def test_a_useless_reply_to_a_question_costs_only_that_stretch():
    gappy = parse_answer("1. navigate_to(kitchen): 1-2 2. wait(2): 5-6")
    segments, report = align(PATH, gappy, "reask", lambda s: "no idea")
    assert covers(segments, 6) and report["reasked"] == 1 and report["kept"] == 4


def test_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match="expected a policy"):
        align(PATH, parse_answer(ZOO["spans"]), "guess")


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_lcs_is_longest(a, b):
    "Against the textbook table."
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    pairs = lcs(a, b)
    assert len(pairs) == table[-1][-1]
    assert all(a[i] == b[j] for i, j in pairs)
    assert all(p < q and r < s for (p, r), (q, s) in zip(pairs, pairs[1:]))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abc(){}[]'\":,-.0123456789\n\\ `|x→“’", max_size=300))
def test_any_text_parses(text):
    for s in parse_answer(text):
        assert isinstance(s, Stated) and not s.empty


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_any_text_aligns_or_is_refused(text, path):
    text = f"1. a(b): {{{text}}} 2. c(d): {{'wait1', '{text}'}} 3. e(f): 2-{len(text)}"
    for policy in ("attach", "reask", "reject"):
        try:
            segments, _ = align(path, parse_answer(text), policy, lambda s: text, least=0)
        except Refused as e:
            assert e.reason
        else:
            assert covers(segments, len(path))


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "add", "swap", "twice", "reword", "move"]), st.integers(0, 10**6)
    ),
    max_size=25,
)


def damaged(actions: list[list[str]], edits) -> list[list[str]]:
    "Lists of actions with edits: dropped, invented, swapped, repeated, reworded, moved on."
    actions = [list(a) for a in actions]
    for edit, at in edits:
        items = actions[at % len(actions)]
        if not items:
            continue
        k = at % len(items)
        if edit == "drop":
            del items[k]
        elif edit == "add":
            items.insert(k, "sing a song")
        elif edit == "swap":
            items[k], items[-1] = items[-1], items[k]
        elif edit == "twice":
            items.insert(k, items[k])
        elif edit == "reword":
            items[k] = "the " + items[k] + " now"
        else:
            actions[(at + 1) % len(actions)].append(items.pop(k))
    return actions


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 60), st.integers(0, 99), EDITS, st.sampled_from(["attach", "reask"]))
def test_damaged_answers_still_cover_the_path(n, seed, edits, policy):
    "Actions come from the path alone; sub-goals from the answer alone, in its order."
    rng = random.Random(seed)
    path = [rng.choice(WORDS) for _ in range(n)]
    true = cut(n, rng)
    lists = damaged([path[s.first : s.last + 1] for s in true], edits)
    text = "\n".join(
        f"{i}- {s.subgoal}: {{{', '.join(repr(a) for a in acts)}}}"
        for i, (s, acts) in enumerate(zip(true, lists), 1)
    )
    try:
        segments, report = align(path, parse_answer(text), policy, lambda s: "?")
    except Refused:
        assert len(edits) > 3 or n < 8
        return
    assert covers(segments, n)
    names = [s.subgoal for s in true]
    order = [names.index(s.subgoal) for s in segments]
    assert order == sorted(set(order))
    assert report["kept"] + report["inserted"] == n
    if not edits:
        assert segments == true


@pytest.mark.parametrize("edits", [0, 200])
def test_two_thousand_steps(edits):
    "A long path with one edit in ten lists keeps nearly all its cuts."
    rng = random.Random(0)
    path = [rng.choice(WORDS) for _ in range(2000)]
    true = cut(2000, rng)
    kinds = ["drop", "add", "swap", "twice", "reword"]
    marks = [(rng.choice(kinds), rng.randrange(10**6)) for _ in range(edits)]
    lists = damaged([path[s.first : s.last + 1] for s in true], marks)
    segments, report = align(path, [Stated(s.subgoal, tuple(a)) for s, a in zip(true, lists)])
    assert covers(segments, 2000)
    assert len(set(segments) & set(true)) >= (0.7 if edits else 1) * len(true)


def answer(n: int, kind: str) -> tuple[list[str], list[Stated]]:
    "A path of n steps, and an answer to it, from perfect to garbage."
    rng = random.Random(n)
    path = [rng.choice(WORDS) + f" {rng.randrange(40)}" for _ in range(n)]
    mixed = path[:]
    rng.shuffle(mixed)
    said = {
        "perfect": path,
        "shuffled": mixed,
        "garbage": [f"blah {i}" for i in range(n)],
        "reworded": [f"now {a}" for a in path],
        "one word": ["wait1"] * n,
        "halves swapped": path[n // 2 :] + path[: n // 2],
    }[kind]
    return path, [Stated(f"f({i})", tuple(said[i : i + 5])) for i in range(0, n, 5)]


def seconds(n: int, kind: str) -> float:
    "The least of three timings of one alignment, in this process's own time."
    path, stated = answer(n, kind)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        try:
            align(path, stated, least=0)
        except Refused:
            pass
        best = min(best, time.process_time() - start)
    return best


KINDS = ["perfect", "shuffled", "garbage", "reworded", "one word", "halves swapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_five_thousand_steps_in_well_under_a_second(kind):
    assert seconds(5000, kind) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_about_linearly(kind):
    "Twice the length takes at most 2.6 times as long; a busy machine gets five tries."
    assert any(seconds(4000, kind) <= 2.6 * seconds(2000, kind) for _ in range(5))


@pytest.mark.parametrize(
    "text",
    [
        "1. a(b): {" + "'x', " * 40000,
        "(" * 100000,
        "a(" * 50000,
        " " * 200000 + "\n" * 200000,
        "1- " * 60000,
        "'" * 200000,
        "1. a(b): {" + " x" * 100000 + "}",
        "[" * 100000 + "]" * 100000,
        "x " * 10 + "y" * 100000 + " (",
    ],
)
def test_no_text_makes_the_parser_slow(text):
    start = time.process_time()
    parse_answer(text)
    assert time.process_time() - start < 3


def test_action_round_trip_on_all_released_paths(released):
    "R11: every oracle action survives `formal` and `raw`, and nearly all get a function form."
    actions = {s["action"] for split in released.values() for row in split for s in row["steps"]}
    assert all(raw(formal(a)) == a for a in actions)
    plain = {a for a in actions if formal(a) == a}
    assert plain <= {"wait", "wait1", *map(str, range(20))}


def test_render_and_parse_on_all_released_paths(released):
    "Both formats give a random cut of every path back."
    rng = random.Random(0)
    for row in released["train"]:
        path = [s["action"] for s in row["steps"]]
        true = cut(len(path), rng)
        for style in ("verbatim", "spans"):
            assert align(path, parse_answer(render(path, true, style)))[0] == true


def test_stretches_name_their_neighbours():
    said = parse_answer("1. navigate_to(kitchen): 1-2 2. wait(2): 6")
    (hole,) = stretches(PATH, said, [0, 0, None, None, None, 1])
    assert (hole.first, hole.last, hole.before, hole.after) == (
        2,
        4,
        "navigate_to(kitchen)",
        "wait(2)",
    )
