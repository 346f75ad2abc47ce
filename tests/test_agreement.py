"""Agreement of teachers: exact on itself, symmetric, and blind to what does not matter."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgd.agreement import (
    agreement_line,
    boundaries,
    compare,
    compare_path,
    draw_agreement,
    f1_interval,
    growth,
    names,
    pooled,
)

cuts = st.sets(st.integers(1, 29), max_size=12)


def segments(starts, name="go(a)"):
    firsts = [0, *sorted(starts)]
    lasts = [first - 1 for first in firsts[1:]] + [29]
    return [{"subgoal": name, "first": a, "last": b} for a, b in zip(firsts, lasts)]


def row(starts, name="go(a)", variation=0):
    return {"task": "boil", "variation": variation, "segments": segments(starts, name)}


@settings(max_examples=100, deadline=None)
@given(cuts, cuts)
def test_f1_is_symmetric_within_bounds_and_one_only_for_equal_cuts(a, b):
    there, back = pooled(compare([row(a)], [row(b)])), pooled(compare([row(b)], [row(a)]))
    assert there["f1"] == back["f1"] and there["precision"] == back["recall"]
    assert 0 <= there["f1"] <= 1 and (there["f1"] == 1) == (a == b)
    assert boundaries(segments(a)) == a and len(names(segments(a))) == 30


def test_verbs_may_agree_where_phrases_do_not():
    counts = compare_path(segments({3}, "go(a)"), segments({3}, "go(b)"))
    assert (counts["same_verb"], counts["same_phrase"]) == (30, 0)


def test_pooling_counts_boundaries_and_not_paths():
    rows = [row(set(range(1, 11))), row({5}, variation=1)]
    hand = [row(set(range(1, 11))), row({6}, variation=1)]
    assert pooled(compare(rows, hand))["f1"] == pytest.approx(10 / 11)
    low, high = f1_interval(compare(rows, hand))
    assert low <= 10 / 11 <= high and f1_interval(compare(rows, hand)) == (low, high)


def test_only_paths_of_both_are_compared_and_none_is_an_error():
    assert len(compare([row({1}), row({1}, variation=1)], [row({1})])) == 1
    with pytest.raises(ValueError, match="annotated by both"):
        compare([row({1})], [row({1}, variation=2)])


def test_a_path_of_another_length_is_an_error():
    short = {"task": "boil", "variation": 0, "segments": segments({3})[:1]}
    with pytest.raises(ValueError):
        compare([short], [row({3})])


def test_growth_never_falls():
    curve = growth([row({1}, f"go({n % 3})", n) for n in range(9)])
    assert curve["phrases"].tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert curve["verbs"].tolist() == [1] * 9


def priced(starts, variation, cost):
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "cost": cost}
    return row(starts, variation=variation) | {"usage": usage}


def test_a_line_counts_only_shared_paths_and_keeps_unknown_costs_apart():
    rows = [priced({3}, 0, 0.5), priced({4}, 1, None), priced({5}, 2, 9.0)]
    hand = [row({3}), row({4}, variation=1)]
    refused = [{"reason": "empty"}, {"reason": "empty"}, {"reason": "refused"}]
    line = agreement_line("llm", rows, hand, refused)
    assert (line["paths"], line["f1"], line["cost"], line["unknown_cost"]) == (2, 1.0, 0.5, 1)
    assert (line["refused"], line["reasons"]) == (3, "2 empty; 1 refused")


def test_the_figure_marks_each_task_and_names_its_reference():
    counts = {"llm": compare([row({3}), row({5}, variation=1)], [row({3}), row({6}, variation=1)])}
    figure = draw_agreement(counts, {"llm": growth([row({3})])}, "title", "program")
    left, right = figure.axes
    assert left.get_xlabel() == "boundary F1 with the program annotation"
    assert left.collections[0].get_offsets().tolist() == [[0.5, 0.0]]
    assert right.lines[0].get_ydata().tolist() == [1]
