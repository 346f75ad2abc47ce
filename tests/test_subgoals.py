"""Whatever a teacher answers becomes segments that cover the path, or a refusal with a reason."""

import json
import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgd.files import root
from sgd.prompts import BOILING, show
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
    "thoughts with a draft": "<think>1. navigate_to(kitchen): 1-1 2. explore(room): 2-5 3. stop(): 6"
    "</think>1. navigate_to(kitchen): 1-2 2. find(metal pot): 3-4 3. wait(2): 5-6",
    "thinking tags": "<Thinking>\n1. a(b): 1-6\n</Thinking>\n<reasoning kind='x'>\n1. c(d): 1-6\n"
    "</reasoning>\n1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n3. wait(2): 5-6",
    "thoughts after the answer": "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n"
    "3. wait(2): 5-6\n<think>or 1. all(): 1-6",
    "lone closing tag": "1. navigate_to(kitchen): 1-1 2. explore(room): 2-6 <think> </think></think>\n"
    "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n3. wait(2): 5-6",
    "draft without tags": "1. navigate_to(kitchen): 1-1 2. explore(room): 2-5 3. stop(): 6\nNo, better:\n"
    "1. navigate_to(kitchen): 1-2 2. find(metal pot): 3-4 3. wait(2): 5-6",
    "draft beyond the end": "1. explore(room): 1-5 2. stop(): 6-9\nAgain:\n"
    "1. navigate_to(kitchen): 1-2 2. find(metal pot): 3-4 3. wait(2): 5-6",
    "draft broken off": "1. navigate_to(kitchen): 1-3 2. wait(3): 4-5. Hm, the pot. Again:\n"
    "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n3. wait(2): 5-6",
    "drafts without numbers": "explore(room): 1-4\nstop(): 5-6\n\nnavigate_to(kitchen): 1-2\n"
    "find(metal pot): 3-4\nwait(2): 5-6",
    "draft in lists": "1. explore(room): {'open door to kitchen', 'go to kitchen', 'open cupboard'}\n"
    "2. rest(): {'pick up metal pot', 'wait1', 'wait1'}\nBetter:\n"
    "1. navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'}\n"
    "2. find(metal pot): {'open cupboard', 'pick up metal pot'}\n3. wait(2): {'wait1', 'wait1'}",
    "a remark that begins again": "1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n"
    "3. wait(2): 5-6\nNote that 1. navigate_to(kitchen): 1-2 is short.",
    "sections numbered apart": "Kitchen\n1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\n"
    "Waiting\n1. wait(2): 5-6",
    "sections of lists": "Kitchen\n1. navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'}\n"
    "2. find(metal pot): {'open cupboard', 'pick up metal pot'}\nPot\n1. wait(2): {'wait1', 'wait1'}",
    "draft and JSON": "1. explore(room): 1-5\n2. stop(): 6\nAs JSON: "
    '[{"subgoal":"navigate_to(kitchen)","first":1,"last":2},'
    '{"subgoal":"find(metal pot)","first":3,"last":4},{"subgoal":"wait(2)","first":5,"last":6}] [x]',
    "every number": "1. navigate_to(kitchen): [1, 2]\n2. find(metal pot): 3, 4\n3. wait(2): [5,6]",
    "and": "1. navigate_to(kitchen): 1 and 2\n2. find(metal pot): steps 3 and 4\n3. wait(2): 5 & 6",
    "steps by name": "1. navigate_to(kitchen): action 1, action 2\n2. find(metal pot): actions 3, 4\n"
    "3. wait(2): step 5 and step 6",
    "without a colon": "navigate_to(kitchen) 1 and 2\nfind(metal pot) 3, 4\nwait(2) 5~6",
    "strings in JSON": '[{"subgoal":"navigate_to(kitchen)","first":"1","last":"2"},'
    '{"subgoal":"find(metal pot)","first":"3","last":"4"},{"subgoal":"wait(2)","first":" 5","last":"6"}]',
    "steps in JSON": '[{"subgoal":"navigate_to(kitchen)","steps":[1,2]},'
    '{"subgoal":"find(metal pot)","steps":["3","4"]},{"subgoal":"wait(2)","steps":"5-6"}]',
    "wrapped JSON": 'Sure [as asked]: {"subgoals":[{"name":"navigate_to(kitchen)","first":1,"last":2},'
    '{"name":"find(metal pot)","first":3,"last":4},{"name":"wait(2)","first":5,"last":6}]} [end]',
    "twice wrapped JSON": '{"answer": {"segments": [{"sub-goal":"navigate_to(kitchen)","actions":[1,2]},'
    '{"sub-goal":"find(metal pot)","actions":[3,4]},{"sub-goal":"wait(2)","actions":[5,6]}]}}',
    "JSON lines": '{"subgoal": "navigate_to(kitchen)", "first_step": 1, "last_step": 2}\n'
    '{"subgoal": "find(metal pot)", "first_step": 3, "last_step": 4}\n'
    '{"subgoal": "wait(2)", "first_step": 5, "last_step": 6}',
    "JSON by phrase": '{"navigate_to(kitchen)": [1, 2], "find(metal pot)": "3-4", '
    '"wait(2)": {"first": 5, "last": 6}}',
    "spans in quotes": "1. navigate_to(kitchen): '1-2'\n2. find(metal pot): \"3-4\"\n3. wait(2): '5-6'",
    "full width": "１．navigate_to（kitchen）：１－２\n２．find（metal pot）：３～４\n３．wait（２）：［５，６］",
    "nothing to see": "\ufeff1. navigate_to(kitchen):\u00a01\u200b-\u200b2\n2. find(metal\u00a0pot): 3-4\n"
    "3. wait(2): 5\u00ad-6",
    "lists with bare numbers": "1. navigate_to(kitchen): {0, open door to kitchen, go to kitchen}\n"
    "2. find(metal pot): {open cupboard, pick up metal pot}\n3. wait(2): {wait1, wait1}",
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
    "two short drafts": ("1. a(b): 1 2. c(d): 2\nor\n1. e(f): 1 2. g(h): 4", "foreign"),
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


THREE = "1. navigate_to(kitchen): {}\n2. find(metal pot): {}\n3. wait(2): {}"
BETWEEN = "- \u2010 \u2011 \u2012 \u2013 \u2014 \u2015 \u2212 \uff0d ~ -- -> .. ... … to through thru until and &".split()


@pytest.mark.parametrize("policy", ["attach", "reject"])
@pytest.mark.parametrize("between", [*BETWEEN, ",", " ,", "、"])
@pytest.mark.parametrize("gap", ["", " "])
def test_any_sign_between_two_step_numbers(between, gap, policy):
    "Every dash, word and comma between the first and the last step."
    if between.isalpha():
        gap = " "
    text = THREE.format(*(f"{a}{gap}{between}{gap}{a + 1}" for a in (1, 3, 5)))
    segments, report = align(PATH, parse_answer(text), policy)
    assert segments == WANTED and report["kept"] == 6 and report["dropped"] == 0


LISTS = {
    "bare": "1, 2, 3, 4",
    "brackets": "[1, 2, 3, 4]",
    "braces": "{1,2,3,4}",
    "and": "1, 2, 3 and 4",
    "Oxford": "steps 1, 2, 3, and 4",
    "dots": "1, 2, ..., 4",
    "parts": "1-2, 3-4",
    "disorder": "[4, 2, 1, 3]",
    "semicolons": "1; 2; 3; 4",
    "a count behind": "1-4, 4 steps",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_step_numbers_is_one_span(name):
    "All of them, not the first two."
    for head in ("1. cook(pot): {}\n2. wait(2): 5, 6", "cook(pot): {}\nwait(2): 5-6"):
        segments, report = align(PATH, parse_answer(head.format(LISTS[name])), "reject")
        assert segments == [Segment("cook(pot)", 0, 3), Segment("wait(2)", 4, 5)]
        assert report["kept"] == 6 and report["inserted"] == report["dropped"] == 0


@pytest.mark.parametrize(
    "text, kept",
    [
        ("1. cook(pot): 1, 2, 4\n2. wait(2): 5-6", 5),  # step 3 is in none
        ("1. cook(pot): 1 and 4\n2. wait(2): 5-6", 4),
        ("1. cook(pot): [1, 2, 3]\n2. wait(2): [4, 6]", 5),  # a pair among lists is a list
        ("1. cook(pot): 1, 2, 4\n2. look(): 3\n3. wait(2): 5-6", 5),  # step 4 would be a return
        ("1. cook(pot): 1, 3\n2. look(): 2, 4\n3. wait(2): 5-6", 5),
        ('[{"name":"cook(pot)","steps":[1,2,4]},{"name":"wait(2)","steps":[5,6]}]', 5),
    ],
)
def test_gaps_in_a_list_of_steps_are_refused_or_mended_with_a_report(text, kept):
    said = parse_answer(text)
    with pytest.raises(Refused) as e:
        align(PATH, said, "reject")
    assert e.value.reason == "missing"
    for policy in ("attach", "reask"):
        segments, report = align(PATH, said, policy, lambda s: "?")
        assert covers(segments, 6) and report["kept"] == kept and report["inserted"] == 6 - kept


def test_lines_without_numbers_or_parentheses():
    lines = "navigate to kitchen: 1-2\n- find: 3, 4\npick up: 5\nwait = 6-6\nTotal steps: 6\nConfidence: 3"
    assert [
        (s.subgoal, s.first, s.last) for s in align(PATH, parse_answer(lines), "reject")[0]
    ] == [
        ("navigate_to_kitchen()", 0, 1),
        ("find()", 2, 3),
        ("pick_up()", 4, 4),
        ("wait()", 5, 5),
    ]
    headings = "Kitchen: 1-4\n1. navigate_to(kitchen): 1-2\n2. find(metal pot): 3-4\nRest: 5-6\n3. wait(2): 5-6"
    assert align(PATH, parse_answer(headings))[0] == WANTED
    mixed = "navigate_to(kitchen): 1-2\nfind(metal pot): 3-4\nwait: 5-6"
    assert align(PATH, parse_answer(mixed), "reject")[0] == [*WANTED[:2], Segment("wait()", 4, 5)]


@pytest.mark.parametrize(
    "text", ["<think>1. a(b): 1-6", "1. a(b): 1-6</think>", "<think>1. a(b): 1-6</think>"]
)
def test_thoughts_alone_are_no_answer(text):
    with pytest.raises(Refused) as e:
        align(PATH, parse_answer(text))
    assert e.value.reason == "unreadable"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(8, 60),
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from(["spans", "verbatim"])),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from(["{}</think>{}", "<think>{}</think>{}", "{}\nNo, wait. Again:\n{}"]),
)
def test_of_several_divisions_the_last_is_the_answer(n, cuts, frame):
    "Whatever was tried before it, the last one is read exactly, and nothing is mended."
    path = [f"step {i}" for i in range(n)]
    *drafts, true = [cut(n, random.Random(seed)) for seed, _ in cuts]
    texts = [render(path, d, style) for d, (_, style) in zip([*drafts, true], cuts)]
    text = frame.format("\nOr:\n".join(texts[:-1]), texts[-1])
    segments, report = align(path, parse_answer(text), "reject")
    assert segments == true and report["kept"] == n and report["dropped"] == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["1", "1-2", "wait()", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["subgoal", "name", "first", "last", "steps", "actions", "go(x)", "plan"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_any_json_aligns_or_is_refused(values):
    "Steps below zero, beyond any end, of any type: never an error."
    text = "\n".join(map(json.dumps, values))
    try:
        segments, report = align(PATH, parse_answer(text), least=0)
    except Refused as e:
        assert e.reason
    else:
        assert covers(segments, 6) and report["kept"] + report["inserted"] == 6


def test_steps_below_zero_are_no_steps():
    rows = '[{"name":"a()","first":-9,"last":-5},{"name":"b()","first":1,"last":6}]'
    assert align(PATH, parse_answer(rows))[0] == [Segment("b()", 0, 5)]


@pytest.mark.parametrize("style", ["spans", "verbatim"])
@pytest.mark.parametrize("runs", [2, 30])
def test_many_drafts_of_a_long_path_in_well_under_a_second(style, runs):
    path = [f"act {i % 70}" for i in range(5000)]
    segments = [Segment(f"do(part {i})", i, i + 4) for i in range(0, 5000, 5)]
    broken = [Stated(f"bad({k})", (), (1, 4000), (), 1) for k in range(runs)]
    whole = [
        Stated(s.subgoal, (), (s.first + 1, s.last + 1), (), i) for i, s in enumerate(segments, 1)
    ]
    if style == "verbatim":
        whole = [
            s._replace(span=None, actions=tuple(path[s.span[0] - 1 : s.span[1]])) for s in whole
        ]
        broken = [Stated("bad()", tuple(path[:4000]), None, (), 1) for _ in range(runs)]
    start = time.process_time()
    assert align(path, [*broken, *whole, *broken[:3]])[0] == segments
    assert time.process_time() - start < 1


def test_ten_thousand_restarts_stay_quick():
    path = ["wait1"] * 5000
    start = time.process_time()
    align(path, [Stated("all()", (), (1, 4999), (), 1)] * 10000)
    assert time.process_time() - start < 1


def test_a_long_list_of_steps_is_quick():
    path = [f"act {i}" for i in range(5000)]
    text = f"1. all(): {', '.join(str(i) for i in range(1, 5001))}"
    start = time.process_time()
    assert align(path, parse_answer(text), "reject")[0] == [Segment("all()", 0, 4999)]
    assert time.process_time() - start < 1


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
        "<think>" * 40000,
        "</think>" * 40000,
        '{"a":[' * 40000,
        '[{"a":1},' * 30000,
        '{"subgoal":"a()","first":1}\n' * 10000,
        "1. a(b): " + "1, " * 60000 + "x",
        "a b: 1-2\n" * 20000,
        "a " * 100000 + ": 1",
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


def test_the_card_names_the_request_that_leaves_the_boiling_example_out():
    "Every other request shows it: a system message, two examples, and the path."
    folder = root() / "data" / "annotations"
    rows = map(json.loads, (folder / "requests_spans.jsonl").read_text("utf-8").splitlines())
    chats = {r["custom_id"].rpartition(".")[0]: r["body"]["messages"] for r in rows}
    boiling = show(BOILING.description, BOILING.actions)
    without = [name for name, chat in chats.items() if chat[1]["content"] != boiling]
    assert without == ["1-1.v0"] and {len(c) for n, c in chats.items() if n not in without} == {6}
    card = " ".join((folder / "CARD.md").read_text("utf-8").split())
    assert f"(`{without[0]}`) leaves the boiling example out" in card
