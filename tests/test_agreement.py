"""Agreement of teachers: exact on itself, symmetric, and blind to what does not matter."""

import re
import sys
from contextlib import chdir
from pathlib import Path

import pandas as pd
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
    finding,
    growth,
    names,
    pooled,
    resolve_agreement,
    write_agreement,
)
from sgd.files import file_sha, read_json, read_jsonl, sidecar, write_jsonl, write_sidecar
from sgd.output import fixed, locate, read_csv

sys.path.insert(0, str(Path(__file__).parent))
from simulated import git, make_project, release  # noqa: E402

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
    assert left.get_xlabel() == "boundary F1 with the program annotation (0-1)"
    assert left.collections[0].get_offsets().tolist() == [[0.5, 0.0]]
    assert right.lines[0].get_ydata().tolist() == [1]
    low, high = f1_interval(counts["llm"])
    band, line = left.patches[0], left.lines[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((low, high))
    assert line.get_xdata() == [0.5, 0.5]
    said = [text.get_text() for text in figure.legends[0].texts]
    assert said == ["llm", f"llm, pooled: 0.50, 95 % interval {low:.2f} to {high:.2f}"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "Two teachers against hand-made annotations, compared in a project and released there."
    home = make_project(tmp_path_factory.mktemp("agreement") / "project")
    data, built = home / "data" / "annotations", home / "build" / "cpu"
    hand = [row({3 + v, 9}, variation=v) | {"teacher": "exemplar", "model": ""} for v in range(4)]
    write_jsonl(data / "exemplars.jsonl", hand)
    git(home, "add", "data")
    git(home, "commit", "--quiet", "--message", "by hand")
    made = [priced({3, 9}, v, 0.25 * v) | {"model": ""} for v in range(6)]
    told = [priced({5, v + 3}, v, None if v else 0.5) | {"model": "gpt-9"} for v in range(5)]
    names = ("program", "llm"), (made, told)
    with chdir(home):
        for name, rows in zip(*names):
            path = write_jsonl(built / "annotations" / f"{name}.train.jsonl.gz", rows)
            facts = {"refused": [{"reason": "empty"}] * (name == "llm")}
            write_sidecar(path, "teachers.annotate", {}, seed=0, **facts)
        files = {n: built / "annotations" / f"{n}.train.jsonl.gz" for n in names[0]}
        files = {"exemplar": data / "exemplars.jsonl", **files}
        write_agreement(files, "train", built / "tables")
        write_agreement(files, "train", home / "again")
    return release(home)


def test_the_table_says_who_the_teachers_are(released):
    page = (released / "paper_results" / "tables" / "agreement.md").read_text()
    commit = sidecar(released / "data" / "annotations" / "program.train.jsonl.gz")["git"]["commit"]
    for said in (
        "cut by hand by the project's authors",
        "share an author",
        "Split: train. Seed: 0",
    ):
        assert said in page
    assert "Stand-in: teacher: program" in page and "llm: a language model, gpt-9" in page
    assert page.count(commit) >= 3 and "Reference: exemplar" in page
    for name in ("agreement.csv", "agreement.md"):
        again = file_sha(released / "again" / name)
        assert again == file_sha(released / "paper_results" / "tables" / name)


def test_every_number_resolves_to_its_source(released):
    "R16: file, key, commit and seed for all numbers; and the number is what the files say."
    tables = released / "paper_results" / "tables"
    provenance = read_json(tables / "agreement.provenance.json")
    for line in read_csv(tables / "agreement.csv").to_dict("records"):
        found = [c for c, v in line.items() if re.fullmatch(r"-?\d+(\.\d+)?", v)]
        assert len(found) == 17
        for column in found:
            sources = resolve_agreement(provenance, line, column)
            files = [locate(source, released) for source in sources]
            assert files[0].parent == released / "data" / "annotations"
            assert all(re.fullmatch("[0-9a-f]{40}", s["commit"]) for s in sources)
            field = sources[0]["key"]["field"].split(",")[0].split(".")[0]
            assert column == "refused" or field in read_jsonl(files[0])[0]
            if column == "refused":
                assert line[column] == str(len(sidecar(files[0])["facts"]["refused"]))
                continue
            again = agreement_line(line["teacher"], *map(read_jsonl, files))[column]
            assert line[column] == (fixed(again, 4) if isinstance(again, float) else str(again))


def test_the_finding_names_the_best_first(released):
    hand = read_jsonl(released / "data" / "annotations" / "exemplars.jsonl")
    other = [row({1}, variation=v) | {"usage": priced({1}, v, 0.0)["usage"]} for v in range(4)]
    same = [r | {"usage": other[0]["usage"]} for r in hand]
    table = pd.DataFrame([agreement_line("llm", other, hand), agreement_line("same", same, hand)])
    assert finding(table, "exemplar") == "F1 of the cuts against exemplar: same 1.00, llm 0.00"
