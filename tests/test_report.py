"""Tables, figures and claims are functions of the rows; each number can be followed to its source (R16)."""

import re
import sys
from contextlib import chdir
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sgd import runs
from sgd.files import content_sha, file_sha, read_json, read_jsonl, root, sidecar
from sgd.output import SHELVES, locate
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
from simulated import PLACES, make_project, release, write_run, write_runs  # noqa: E402

REPORTED = root() / "paper_results" / "reported"
LEDGER = root() / "paper_results" / "claims.yaml"
ROWS, TABLES = PLACES["rows"], PLACES["tables"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Tables and figures of simulated rows, built in a project and released there."
    home = make_project(tmp_path_factory.mktemp("report") / "project")
    build = home / "build" / "cpu"
    with chdir(home):
        write_runs(build / "rows")
        places = (home / "paper_results" / "reported", build / "tables", build / "figures")
        write_tables(build / "rows", *places, replicates=300)
    return release(home)


def lines(home, table):
    return read_csv(home / TABLES / f"{table}.csv").to_dict("records")


def test_columns_and_order(made):
    main = read_csv(made / TABLES / "main.csv")
    assert list(main.columns) == COLUMNS
    assert main["agent"].iloc[0] == "oracle"
    ours = main[main["protocol"] != ""]
    assert (ours.groupby(["protocol"], sort=False)["agent"].first() == "oracle").all()
    assert list(ours["class"].iloc[:4]) == ["S", "M", "L", "all"]
    assert ours.index.max() < main[main["protocol"] == ""].index.min()


def test_published_rows_are_marked_and_have_no_interval(made):
    published = read_csv(made / TABLES / "main.csv").query("protocol == ''")
    assert len(published) > 30 and published["profile"].str.startswith("reported: ").all()
    assert (published[["ci_low", "ci_high", "seeds", "episodes"]] == "").all().all()
    hit = published.query("agent == 'Sub-goal Distillation' and `class` == 'all'").iloc[0]
    assert (hit["score"], hit["solved_tasks"], hit["params"]) == ("65.43", "11", "770000000")
    assert not len(published.query("agent == \"Swift-only (authors' run)\" and `class` == 'L'"))


def test_no_pair_with_a_published_row(made):
    pairs = read_csv(made / TABLES / "pairs.csv")
    assert len(pairs) and not pairs["profile"].str.startswith("reported").any()
    asked = set(zip(pairs["agent"], pairs["teacher"], pairs["baseline"], pairs["baseline_teacher"]))
    assert asked == {
        ("hierarchical", "program", "flat", ""),
        ("hierarchical", "random", "flat", ""),
        ("hierarchical", "program", "hierarchical", "random"),
    }
    assert set(pairs["equal_params"]) == {"yes"}


def test_the_same_rows_give_the_same_bytes(made, tmp_path):
    write_tables(made / ROWS, REPORTED, tmp_path / TABLES, tmp_path / "figures", replicates=300)
    first = [p for top in (TABLES, "figures") for p in sorted((made / top).iterdir())]
    names = {p.name for p in first}
    assert {"main.md", "provenance.json", "main_scores.svg", "per_task.png"} <= names
    for path in first:
        if (
            path.suffix != ".json"
        ):  # the sidecar has the time, the provenance the folder that was read
            assert file_sha(path) == file_sha(tmp_path / path.relative_to(made)), path.name


def test_figures_carry_no_date(made):
    svg = (made / "figures" / "main_scores.svg").read_text()
    assert "<dc:date>" not in svg and "matplotlib.org" not in svg


def test_the_footer_says_how(made):
    text = (made / TABLES / "main.md").read_text()
    for expected in ("max_moves = 100", "0123456789ab", "300 replicates", "one seed"):
        assert expected in text
    assert "not an LLM" in text and "not FLAN-T5" in text
    assert sidecar(made / ROWS / "flat.s0.paper.jsonl.gz")["git"]["commit"] in text


def test_every_figure_names_its_stand_ins(made, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        "sgd.report.save_figure", lambda figure, stem, _: drawn.update({stem.name: figure})
    )
    write_tables(made / ROWS, REPORTED, tmp_path, tmp_path, replicates=10)
    notes = (
        drawn["main_scores"].get_supxlabel(),
        drawn["per_task"].legends[0].get_title().get_text(),
    )
    assert all("a labelling program, not an LLM" in n and "not FLAN-T5" in n for n in notes)


def test_the_footer_tells_of_uncommitted_changes(tmp_path):
    home = make_project(tmp_path / "project")
    (home / "settings.ini").write_text((home / "settings.ini").read_text() + "\n# changed\n")
    with chdir(home):
        path = write_run(home / "rows", "flat")
        write_tables(home / "rows", REPORTED, home / "t", home / "f", replicates=10)
    commit = sidecar(path)["git"]["commit"]
    assert f"commit: {commit} (with uncommitted changes)." in (home / "t" / "main.md").read_text()


def test_places_of_a_release_are_those_of_the_release_command():
    made = {"rows": "episodes", "students": "students", "oracle": "oracle"}
    for kind, name in (made | {"reported": "reported", "annotations": "annotations"}).items():
        place = runs.released(f"{name}/x", "cpu").relative_to(root()).as_posix()
        assert place == f"{SHELVES[kind].format(profile='cpu')}/x"


def test_a_source_that_was_altered_is_not_taken(made):
    source = resolve(read_json(made / TABLES / "provenance.json"), lines(made, "main")[0], "score")[
        0
    ]
    assert locate(source, made) == made / ROWS / "oracle.s0.paper.jsonl.gz"
    with pytest.raises(FileNotFoundError, match="oracle.s0.*000000.*got none, try"):
        locate(source | {"content": "000000"}, made)


@lru_cache
def read_run(path):
    "Rows and sidecar of a run, checked once."
    record = sidecar(path)
    rows = read_jsonl(path)
    assert content_sha(path) == record["content_sha"]
    assert {row["protocol"] for row in rows} == {record["facts"]["run"]["protocol"]["sha"]}
    facts = {k: v for k, v in record["facts"]["run"].items() if k != "protocol"}
    return record, pd.DataFrame([row | facts for row in rows])


def rows_behind(home, sources, classes):
    "The episode rows that the sources of a number name, checked against the files."
    found = []
    for source in sources:
        record, rows = read_run(locate(source, home))
        assert re.fullmatch("[0-9a-f]{40}", source["commit"])
        assert source["content"] == record["content_sha"]
        assert source["commit"] == record["git"]["commit"]
        assert source["seed"] == record["facts"]["run"]["seed"]
        assert source["protocol"] == record["facts"]["run"]["protocol"]["sha"]
        field, where = source["key"]["field"], source["key"]
        assert field.removeprefix("facts.run.") in {*rows, *record["facts"]["run"]}
        inside = rows["task_id"] == where.get("task_id")
        if "class" in where:
            inside = rows["task_id"].map(classes).eq(where["class"]) | (where["class"] == "all")
        found.append(rows[inside] if {"class", "task_id"} & set(where) else rows)
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
    "A number of a table of scores, computed anew."
    if column == "solved_tasks":
        return fixed(
            rows.groupby(["seed", "task_id"])["success"].all().groupby("seed").sum().mean()
        )
    return {
        "success": lambda: fixed(100 * mean(rows, "success")),
        "episodes": lambda: str(len(rows)),
        "seeds": lambda: str(rows["seed"].nunique()),
        "seed": lambda: str(rows["seed"].iloc[0]),
        "params": lambda: str(rows["params"].iloc[0]),
        "baseline_params": lambda: str(rows["params"].iloc[0]),
    }.get(column, lambda: fixed(mean(rows, "score")))()


def compared(rows, line, column):
    "A number of the table of pairs, computed anew."
    first = (rows["agent"] == line["agent"]) & (rows["teacher"] == line["teacher"])
    keys = ["task_id", "variation", "seed"]
    both = rows[first].merge(rows[~first], on=keys, suffixes=("", "_b"))
    if column in ("seeds", "episodes"):
        return str(both["seed"].nunique() if column == "seeds" else len(both))
    gap = both["score"] - both["score_b"]
    both["win"] = 100 * ((gap > 0) + 0.5 * (gap == 0))
    value = mean(both.assign(gap=gap), {"difference": "gap", "improvement": "win"}[column])
    return fixed(value)


def numbers(line):
    "The columns of a line that hold a number."
    return [c for c, v in line.items() if re.fullmatch(r"-?\d+(\.\d+)?", v)]


@pytest.mark.parametrize("table", ["main", "per_task", "seeds", "pairs"])
def test_every_number_resolves_to_its_source(made, table):
    "R16: file, key, commit, protocol hash and seed, for all numbers; and the number is what the source says."
    provenance, classes = read_json(made / TABLES / "provenance.json"), length_classes(REPORTED)
    checked = {"ours": 0, "published": 0}
    for line in lines(made, table):
        assert numbers(line)
        for column in numbers(line):
            sources = resolve(provenance, line, column)
            if line["protocol"] == "":
                assert published_value(made, sources[0], line) == line[column]
                checked["published"] += 1
                continue
            rows = rows_behind(made, sources, classes)
            both = table == "pairs" and not column.endswith("params")
            assert len(sources) == int(line.get("seeds", 1)) * (1 + both)
            if not column.startswith("ci_") and not column.endswith(("_low", "_high")):
                again = compared(rows, line, column) if both else recomputed(rows, column)
                assert again == line[column], (line, column)
            checked["ours"] += 1
    assert checked["ours"] > 20 and (checked["published"] > 40) == (table in ("main", "per_task"))


def published_value(home, source, line):
    "A published number, read from the cell that its source names."
    path, key = locate(source, home), source["key"]
    assert re.fullmatch("[0-9a-f]{40}", source["commit"])
    table = read_csv(path)
    long = {v: k for k, v in SHORT.items()}
    wanted = {key.get("task_id"), key.get("class"), long.get(key.get("class"))}
    table = table[table["method"].isin(key["methods"]) & (table["confidence"] != "derived")]
    if key["column"] == "score":
        cell = table[table["task_id"].isin(wanted) & table["metric"].isin(SCALE)].iloc[0]
        return fixed(SCALE[cell["metric"]] * number(cell["value"]))
    kind = "solved" if key["column"] == "solved_tasks" else "param"
    cell = table[table["metric"].str.contains(kind)].iloc[0]
    return str(round(number(cell["value"]) * COUNTS[cell["metric"]]))


def test_a_pair_rests_on_the_seeds_that_both_have(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "flat", seed=seed)
    write_run(tmp_path, "hierarchical", "program", seed=1)
    write_tables(tmp_path, REPORTED, tmp_path / "t", tmp_path / "f", replicates=10)
    line = read_csv(tmp_path / "t" / "pairs.csv").iloc[0].to_dict()
    sources = resolve(read_json(tmp_path / "t" / "provenance.json"), line, "difference")
    assert [(s["name"], s["seed"]) for s in sources] == [
        ("hierarchical-program.s1.paper.jsonl.gz", 1),
        ("flat.s1.paper.jsonl.gz", 1),
    ]


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
    ledger = update_claims(LEDGER, made / TABLES, tmp_path / "claims.yaml")
    fresh = check_claims(ledger, made / TABLES)
    assert {"analogue: agrees", "analogue: disagrees", "not run"} == set(fresh["status"])
    changed = ledger.read_text().replace("analogue: disagrees", "analogue: agrees", 1)
    ledger.write_text(changed)
    with pytest.raises(ValueError, match="ours-.*analogue: agrees, should be analogue: disagrees"):
        check_claims(ledger, made / TABLES)
    assert ledger.read_text() == changed


def test_a_verdict_follows_the_table(made, tmp_path):
    main = read_csv(made / TABLES / "main.csv")
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
    pairs = read_csv(made / TABLES / "pairs.csv")
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
        judge(tmp_path / "c.yaml", made / TABLES)


def test_the_committed_ledger_is_fresh():
    check_claims(LEDGER, root() / "paper_results" / "tables")
