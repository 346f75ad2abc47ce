"""Tables, figures and claims are functions of the rows; each number can be followed to its source (R16)."""

import re
import sys
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sgd.files import content_sha, file_sha, read_json, read_jsonl, root, sidecar
from sgd.report import (
    COLUMNS,
    COUNTS,
    SCALE,
    SHORT,
    check_claims,
    fixed,
    judge,
    number,
    read_csv,
    resolve,
    update_claims,
    write_tables,
)
from sgd.stats import length_classes

sys.path.insert(0, str(Path(__file__).parent))
from simulated import write_run, write_runs  # noqa: E402

REPORTED = root() / "paper_results" / "reported"
LEDGER = root() / "paper_results" / "claims.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Tables and figures of simulated rows."
    home = tmp_path_factory.mktemp("report")
    write_runs(home / "runs")
    write_tables(home / "runs", REPORTED, home / "tables", home / "figures", replicates=300)
    return home


def lines(home, table):
    return read_csv(home / "tables" / f"{table}.csv").to_dict("records")


def test_columns_and_order(made):
    main = read_csv(made / "tables" / "main.csv")
    assert list(main.columns) == COLUMNS
    assert main["agent"].iloc[0] == "oracle"
    ours = main[main["protocol"] != ""]
    assert (ours.groupby(["protocol"], sort=False)["agent"].first() == "oracle").all()
    assert list(ours["class"].iloc[:4]) == ["S", "M", "L", "all"]
    assert ours.index.max() < main[main["protocol"] == ""].index.min()


def test_published_rows_are_marked_and_have_no_interval(made):
    published = read_csv(made / "tables" / "main.csv").query("protocol == ''")
    assert len(published) > 30 and published["profile"].str.startswith("reported: ").all()
    assert (published[["ci_low", "ci_high", "seeds", "episodes"]] == "").all().all()
    hit = published.query("agent == 'Sub-goal Distillation' and `class` == 'all'").iloc[0]
    assert (hit["score"], hit["solved_tasks"], hit["params"]) == ("65.43", "11", "770000000")
    assert not len(published.query("agent == \"Swift-only (authors' run)\" and `class` == 'L'"))


def test_no_pair_with_a_published_row(made):
    pairs = read_csv(made / "tables" / "pairs.csv")
    assert len(pairs) and not pairs["profile"].str.startswith("reported").any()
    asked = set(zip(pairs["agent"], pairs["teacher"], pairs["baseline"], pairs["baseline_teacher"]))
    assert asked == {
        ("hierarchical", "program", "flat", ""),
        ("hierarchical", "random", "flat", ""),
        ("hierarchical", "program", "hierarchical", "random"),
    }
    assert set(pairs["equal_params"]) == {"yes"}


def test_the_same_rows_give_the_same_bytes(made, tmp_path):
    write_tables(made / "runs", REPORTED, tmp_path / "tables", tmp_path / "figures", replicates=300)
    first = sorted(p for p in made.rglob("*") if p.is_file() and "runs" not in p.parts)
    names = {p.name for p in first}
    assert {"main.md", "provenance.json", "main_scores.svg", "per_task.png"} <= names
    for path in first:
        if path.name != "main.csv.json":  # the sidecar has the time
            assert file_sha(path) == file_sha(tmp_path / path.relative_to(made)), path.name


def test_figures_carry_no_date(made):
    svg = (made / "figures" / "main_scores.svg").read_text()
    assert "<dc:date>" not in svg and "matplotlib.org" not in svg


def test_the_footer_says_how(made):
    text = (made / "tables" / "main.md").read_text()
    for expected in ("max_moves = 100", "0123456789ab", "300 replicates", "one seed"):
        assert expected in text
    assert "not an LLM" in text and "not FLAN-T5" in text
    assert sidecar(made / "runs" / "flat.s0.paper.jsonl.gz")["git"]["commit"] in text


@lru_cache
def read_run(path):
    "Rows and sidecar of a run, checked once."
    record = sidecar(path)
    rows = read_jsonl(path)
    assert content_sha(path) == record["content_sha"]
    assert {row["protocol"] for row in rows} == {record["facts"]["run"]["protocol"]["sha"]}
    facts = {k: v for k, v in record["facts"]["run"].items() if k != "protocol"}
    return record, pd.DataFrame([row | facts for row in rows])


def rows_behind(home, sources, where, classes):
    "The episode rows that the sources of a number name, checked against the files."
    found = []
    for source in sources:
        record, rows = read_run(home / source["file"])
        assert source["content"] == record["content_sha"]
        assert source["commit"] == record["git"]["commit"]
        assert source["seed"] == record["facts"]["run"]["seed"]
        assert source["protocol"] == record["facts"]["run"]["protocol"]["sha"]
        inside = rows["task_id"] == where.get("task_id")
        if "class" in where:
            inside = rows["task_id"].map(classes).eq(where["class"]) | (where["class"] == "all")
        found.append(rows[inside])
    return pd.concat(found)


def mean(rows, field):
    return (
        rows.astype({field: float})
        .groupby(["seed", "task_id"])[field]
        .mean()
        .groupby("seed")
        .mean()
        .mean()
    )


def recomputed(rows, column):
    "A number of the main or the per-task table, computed anew."
    if column == "solved_tasks":
        return fixed(
            rows.groupby(["seed", "task_id"])["success"].all().groupby("seed").sum().mean()
        )
    return {
        "score": lambda: fixed(mean(rows, "score")),
        "success": lambda: fixed(100 * mean(rows, "success")),
        "episodes": lambda: str(len(rows)),
        "seeds": lambda: str(rows["seed"].nunique()),
        "params": lambda: str(rows["params"].iloc[0]),
    }[column]()


@pytest.mark.parametrize("table", ["main", "per_task"])
def test_every_number_resolves_to_its_source(made, table):
    "R16: file, key, commit, protocol hash and seed, for all numbers; and the number is what the source says."
    provenance, classes = read_json(made / "tables" / "provenance.json"), length_classes(REPORTED)
    numbers = "seeds score ci_low ci_high success episodes solved_tasks params".split()
    checked = {"ours": 0, "published": 0}
    for line in lines(made, table):
        for column in numbers:
            if not line.get(column):
                continue
            sources = resolve(provenance, line, column)
            assert sources
            if line["protocol"] == "":
                assert published_value(sources[0], line) == line[column]
                checked["published"] += 1
                continue
            assert len(sources) == int(line["seeds"])
            assert all(re.fullmatch("[0-9a-f]{40}", s["commit"]) for s in sources)
            rows = rows_behind(made, sources, sources[0]["key"], classes)
            if not column.startswith("ci_"):
                assert recomputed(rows, column) == line[column], (line, column)
            checked["ours"] += 1
    assert min(checked.values()) > 40


def published_value(source, line):
    "A published number, read from the cell that its source names."
    table = read_csv(REPORTED.parent / source["file"])
    assert content_sha(REPORTED.parent / source["file"]) == source["content"]
    key = source["key"]
    long = {v: k for k, v in SHORT.items()}
    wanted = {key.get("task_id"), key.get("class"), long.get(key.get("class"))}
    names = [n for n in table["method"] if n.split(" (Sub-goal")[0] in (key["method"], "Ours")]
    names = [key["method"]] if key["method"] in set(table["method"]) else names
    table = table[table["method"].isin(names) & (table["confidence"] != "derived")]
    if key["column"] == "score":
        cell = table[table["task_id"].isin(wanted) & table["metric"].isin(SCALE)].iloc[0]
        return fixed(SCALE[cell["metric"]] * number(cell["value"]))
    kind = "solved" if key["column"] == "solved_tasks" else "param"
    cell = table[table["metric"].str.contains(kind)].iloc[0]
    return str(round(number(cell["value"]) * COUNTS[cell["metric"]]))


def test_pairs_resolve_to_both_agents(made):
    provenance = read_json(made / "tables" / "provenance.json")
    classes = length_classes(REPORTED)
    for line in lines(made, "pairs"):
        sources = resolve(provenance, line, "difference")
        assert len(sources) == 2 * int(line["seeds"])
        rows = rows_behind(made, sources, sources[0]["key"], classes)
        first = (rows["agent"] == line["agent"]) & (rows["teacher"] == line["teacher"])
        gap = mean(rows[first], "score") - mean(rows[~first], "score")
        assert fixed(gap) == line["difference"]


def test_altered_rows_are_refused(tmp_path):
    path = write_run(tmp_path, "flat")
    other = write_run(tmp_path / "other", "flat", seed=1)
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="flat.s0.paper.jsonl.gz"):
        write_tables(tmp_path, REPORTED, tmp_path / "t", tmp_path / "f", replicates=10)


def test_no_rows_yet(tmp_path):
    (tmp_path / "runs").mkdir()
    main = write_tables(tmp_path / "runs", REPORTED, tmp_path, tmp_path, replicates=10)
    assert set(read_csv(main)["protocol"]) == {""}


def test_networks_of_another_size_are_another_line(tmp_path):
    write_run(tmp_path / "a", "flat")
    write_run(tmp_path / "b", "flat", params=2_000_000)
    write_tables(tmp_path, REPORTED, tmp_path / "t", tmp_path / "f", replicates=10)
    main = read_csv(tmp_path / "t" / "main.csv").query("protocol != ''")
    assert set(main["params"]) == {"1000000", "2000000"} and len(main) == 8


def test_a_stale_ledger_fails(made, tmp_path):
    ledger = update_claims(LEDGER, made / "tables", tmp_path / "claims.yaml")
    fresh = check_claims(ledger, made / "tables")
    assert {"analogue: agrees", "analogue: disagrees", "not run"} == set(fresh["status"])
    changed = ledger.read_text().replace("analogue: disagrees", "analogue: agrees", 1)
    ledger.write_text(changed)
    with pytest.raises(ValueError, match="ours-.*analogue: agrees, should be analogue: disagrees"):
        check_claims(ledger, made / "tables")
    assert ledger.read_text() == changed


def test_a_verdict_follows_the_table(made, tmp_path):
    main = read_csv(made / "tables" / "main.csv")
    hit = (
        (main["teacher"] == "program")
        & (main["class"] == "all")
        & (main["agent"] == "hierarchical")
    )
    for score, status in (("65.00", "analogue: agrees"), ("20.00", "analogue: disagrees")):
        main.loc[hit, "score"] = score
        main.to_csv(tmp_path / "main.csv", index=False)
        assert judge(LEDGER, tmp_path).set_index("id").loc["ours-overall", "now"] == status
    claims = yaml.safe_load(LEDGER.read_text())
    paper = [c for c in claims if c["id"] == "flan-t5-overall"]
    main.loc[hit, ["profile", "teacher"]] = ["paper", "llm"]
    main.to_csv(tmp_path / "main.csv", index=False)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(paper))
    assert judge(tmp_path / "one.yaml", tmp_path)["now"].tolist() == ["differs"]
    main.loc[hit, "score"] = "66.00"
    main.to_csv(tmp_path / "main.csv", index=False)
    assert judge(tmp_path / "one.yaml", tmp_path)["now"].tolist() == ["reproduced"]


def test_a_sign_needs_an_interval_without_zero(made, tmp_path):
    pairs = read_csv(made / "tables" / "pairs.csv")
    pairs["difference"] = "5.00"
    for low, status in (("1.00", "analogue: agrees"), ("-1.00", "analogue: disagrees")):
        pairs["difference_low"], pairs["difference_high"] = low, "9.00"
        pairs.to_csv(tmp_path / "pairs.csv", index=False)
        assert judge(LEDGER, tmp_path).set_index("id").loc["subgoals-help", "now"] == status


def test_an_ambiguous_key_is_an_error(made, tmp_path):
    claims = yaml.safe_load(LEDGER.read_text())[:1]
    del claims[0]["our_value"]["key"]["teacher"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(claims))
    with pytest.raises(ValueError, match="ours-overall: expected one line of main.csv, got 2"):
        judge(tmp_path / "c.yaml", made / "tables")


def test_the_committed_ledger_is_fresh():
    check_claims(LEDGER, root() / "paper_results" / "tables")
