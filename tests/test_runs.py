"""Runs end as they should: checked parameters, kept failures, resumed lines, a release that holds."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from sgd import cli, files, runs

ROOT = Path(__file__).resolve().parent.parent
SGD = str(Path(sys.executable).with_name("sgd"))
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

STAGE = """
from sgd.files import read_jsonl, write_jsonl, write_sidecar
from sgd.runs import build, place
inputs = [place(f, profile, start) for f in needs]
rows = [{"task": "boil", "variation": v, "score": 10 * v, "wall_s": 0.1} for v in range(3)]
path = write_jsonl(build(profile) / made, rows)
write_sidecar(path, "files.toy", {"made": made}, inputs)
"""
HEAD = "profile: str = None\nstart: str = 'oracle'\n"
TRAIN = """
from sgd.files import write_json, write_sidecar
from sgd.runs import build, place
needs = [place(f"oracle/{s}.jsonl.gz", profile, start) for s in ("train", "dev")]
out = build(profile) / "students" / student
write_json(out / "training.json", {"rate": rate})
write_sidecar(out, "files.toy", {"rate": rate}, needs)
"""
PLAY = """
from sgd.runs import parse_run
s = parse_run(run).student
needs = [f"students/{s}"] if s else []
made = f"episodes/{run}.jsonl.gz"
"""
REPORT = """
from sgd.files import write_atomic
from sgd.runs import build, table_rows
names = sorted(p.name for p in table_rows(profile, start).glob("*.jsonl.gz"))
for kind in ("tables", "figures"):
    write_atomic(build(profile) / kind / f"{table}.csv", "\\n".join(names))
"""


def write_notebook(folder, name, parameters, *sources):
    cells = [new_code_cell(parameters), *map(new_code_cell, sources)]
    cells[0].metadata["tags"] = ["parameters"]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A small project: the real Snakefile, toy notebooks."
    for name in ("settings.ini", "Snakefile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    nbs = tmp_path / "nbs" / "experiments"
    split = "split: str = None"
    oracle = 'made, needs = f"oracle/{split}.jsonl.gz", []'
    write_notebook(nbs, "10_oracle", HEAD + split, oracle + STAGE)
    labels = 'made = f"annotations/{teacher}.{split}.jsonl.gz"\n'
    labels += 'needs = [f"oracle/{split}.jsonl.gz"]'
    write_notebook(nbs, "20_annotate", HEAD + split + "\nteacher: str = None", labels + STAGE)
    write_notebook(nbs, "30_train", HEAD + "student: str = None\nrate: float = 0.1", TRAIN)
    write_notebook(nbs, "40_play", HEAD + "run: str = None", PLAY + STAGE)
    write_notebook(nbs, "50_tables", HEAD + "table: str = 'main'", REPORT)
    write_notebook(nbs, "60_efficiency", HEAD + "table: str = 'efficiency'", REPORT)
    compare = "from sgd.files import write_json\nfrom sgd.runs import build, compare\n"
    compare += 'write_json(build(profile) / "compare.json", compare(profile, start, rows))'
    write_notebook(nbs, "70_compare", HEAD + "rows: str = 'main'", compare)
    (tmp_path / "params").mkdir()
    text = "common: {}\nrows:\n  main: [random.s0.paper]\n  others: [oracle.s0.paper]\n"
    for profile in ("cpu", "smoke"):
        (tmp_path / "params" / f"{profile}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# -- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, changes, words",
    [
        (
            "30_train: {rte: 0.5}",
            {"student": "flat.s0"},
            ["30_train", "unknown", "'rte'", "'rate'"],
        ),
        ("30_train: {rate: 3e-5}", {"student": "flat.s0"}, ["30_train", "'rate'", "3.0e-5"]),
        ("30_train: {rate: true}", {"student": "flat.s0"}, ["30_train", "'rate'", "float"]),
        ("30_train: {}", {}, ["30_train", "'student'", "missing"]),
        ("30_trian: {}", {"student": "flat.s0"}, ["cpu.yaml", "'30_trian'", "'30_train'"]),
        ("common: {rate: 1.0, widht: 8}", {"student": "flat.s0"}, ["cpu.yaml", "'widht'"]),
        ("30_train: [", {"student": "flat.s0"}, ["cpu.yaml", "YAML"]),
    ],
)
def test_wrong_parameters_are_named_with_their_notebook(project, section, changes, words):
    edit(project / "params" / "cpu.yaml", "common: {}\n", section + "\n")
    with pytest.raises(runs.ParameterError) as caught:
        runs.resolve(runs.find_notebook("30_train"), "cpu", changes)
    for word in words:
        assert word in str(caught.value)


def test_an_unread_parameter_is_an_error(project):
    write_notebook(
        project / "nbs/experiments", "30_train", HEAD + "depth: int = 3", "profile, start"
    )
    with pytest.raises(runs.ParameterError, match="30_train: parameter 'depth' is unread"):
        runs.resolve(runs.find_notebook("30_train"), "cpu")


def test_a_notebook_without_parameters_cell_is_an_error(project):
    path = project / "nbs/experiments/30_train.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), path)
    with pytest.raises(ValueError, match="30_train.*one cell tagged 'parameters', got 0"):
        runs.parameters(path)


def test_unknown_notebooks_profiles_stages_are_named(project):
    with pytest.raises(FileNotFoundError, match="30_trian.*30_train"):
        runs.find_notebook("30_trian")
    with pytest.raises(FileNotFoundError, match="'cpv'.*'cpu'"):
        runs.read_profile("cpv")
    with pytest.raises(ValueError, match="FROM.*'rolout'"):
        runs.plan("cpu", "rolout")


def test_a_plan_is_cut_at_its_start(project):
    edit(
        project / "params/cpu.yaml",
        "[random",
        "[hierarchical-program.s0.paper, flat.s0.paper, random",
    )
    names = [step.name for step in runs.plan("cpu", "oracle", "main")]
    assert "10_oracle.train" in names and "10_oracle.test" not in names
    assert "20_annotate.program.dev" in names and "30_train.flat.s0" in names
    cut = {step.name: step for step in runs.plan("cpu", "rollout", "main")}
    assert [n for n in cut if n[0] in "123"] == []
    assert cut["40_play.flat.s0.paper"].needs == ()
    assert cut["40_play.flat.s0.paper"].changes == {"run": "flat.s0.paper", "start": "rollout"}
    assert "40_play.flat.s0.paper" in cut["50_tables"].needs


def test_studies_belong_to_all_rows_but_those_of_tables_always(project):
    edit(
        project / "params/cpu.yaml",
        "  others:",
        "  studies: [05_simulator, 35_architectures, 65_agreement]\n  others:",
    )
    nbs = project / "nbs/experiments"
    for name in runs.STUDIES:
        write_notebook(nbs, name, HEAD, "profile, start")
    stages = {s.name: s.stage for s in runs.plan("cpu", "oracle", "all")}
    assert {n: stages[n] for n in runs.STUDIES} == {n: s for n, (_, s) in runs.STUDIES.items()}
    assert not {"05_simulator", "35_architectures"} & {
        s.name for s in runs.plan("cpu", "oracle", "main")
    }
    assert "65_agreement" in {s.name for s in runs.plan("cpu", "tables", "main")}
    edit(project / "params/cpu.yaml", "65_agreement", "65_agrement")
    with pytest.raises(
        runs.ParameterError, match="cpu.yaml: unknown study '65_agrement'.*65_agreement"
    ):
        runs.plan("cpu")


def test_the_comparison_comes_after_every_other_report(project):
    edit(project / "params/cpu.yaml", "  others:", "  studies: [65_agreement]\n  others:")
    write_notebook(project / "nbs/experiments", "65_agreement", HEAD, "profile, start")
    (project / "paper_results/runs/cpu").mkdir(parents=True)
    last = runs.plan("cpu", "tables", "main")[-1]
    assert last.name == "70_compare" and last.changes == {"start": "tables", "rows": "main"}
    assert set(last.needs) == {"50_tables", "60_efficiency", "65_agreement"}


def finish(profile, step, inputs=()):
    "What a run leaves: its result, the sidecar, the stamp."
    path = runs.build(profile) / step.made
    is_folder = not step.made.endswith(".gz")
    (files.write_json if is_folder else files.write_jsonl)(
        path / "training.json" if is_folder else path, [{"task": "boil", "variation": 0}]
    )
    files.write_sidecar(path, "files.toy", {}, [runs.build(profile) / i for i in inputs])
    values = runs.resolve(runs.find_notebook(step.notebook), profile, step.changes)
    runs.write_stamp(profile, step.name, step.notebook, values, step.made)


def test_changed_parameters_code_and_inputs_show_as_stale(project):
    edit(project / "params/cpu.yaml", "[random", "[flat.s0.paper, random")
    steps = {step.name: step for step in runs.plan("cpu")}
    for name in ("10_oracle.train", "10_oracle.dev"):
        finish("cpu", steps[name])
    finish("cpu", steps["30_train.flat.s0"], ["oracle/train.jsonl.gz", "oracle/dev.jsonl.gz"])

    def states():
        return {row["run"]: row["state"] for row in runs.status("cpu")}

    assert states()["30_train.flat.s0"] == "done"
    assert states()["20_annotate.program.train"] == "missing"
    edit(project / "params/cpu.yaml", "common: {}\n", "common: {}\n30_train: {rate: 0.5}\n")
    assert states()["30_train.flat.s0"] == "stale-params"
    assert states()["10_oracle.train"] == "done"
    edit(project / "params/cpu.yaml", "30_train: {rate: 0.5}\n", "")
    path = files.sidecar_path(project / "build/cpu/students/flat.s0")
    record = files.read_json(path)
    files.write_json(path, record | {"code_sha": "0" * 12})
    assert states()["30_train.flat.s0"] == "stale-code"
    files.write_json(path, record)
    files.write_jsonl(project / "build/cpu/oracle/train.jsonl.gz", [])
    assert states()["10_oracle.train"] == "damaged"
    assert states()["30_train.flat.s0"] == "stale-inputs"
    assert len(runs.drop_bad_stamps("cpu", list(steps.values()))) == 1
    assert states()["10_oracle.train"] == "missing"


def test_resolved_parameters_are_rewritten_only_if_changed(project):
    notebook = runs.find_notebook("30_train")
    path = runs.write_params("x", notebook, "cpu", {"student": "flat.s0"})
    os.utime(path, (1, 1))
    runs.write_params("x", notebook, "cpu", {"student": "flat.s0"})
    assert path.stat().st_mtime == 1
    runs.write_params("x", notebook, "cpu", {"student": "flat.s0", "rate": 0.2})
    assert path.stat().st_mtime > 1


def test_a_new_release_or_price_is_a_reason_to_run_again(project):
    head = HEAD + "prices: str = 'data/prices.yaml'\nout: str = 'build/cpu/tables'"
    write_notebook(
        project / "nbs/experiments", "60_efficiency", head, "profile, start, prices, out"
    )
    prices = project / "data/prices.yaml"
    for path in (prices, project / "build/cpu/tables/main.csv"):
        files.write_atomic(path, "one")
    runs.write_manifest()
    notebook = runs.find_notebook("60_efficiency")

    def rewritten(start):
        path = runs.write_params("x", notebook, "cpu", {"start": start})
        new = path.stat().st_mtime > 1
        os.utime(path, (1, 1))
        return new

    assert rewritten("rollout") and not rewritten("rollout")
    prices.write_text("two")
    assert rewritten("rollout") and not rewritten("rollout")
    files.write_atomic(project / "build/cpu/tables/main.csv", "two")
    assert not rewritten("rollout")
    files.write_atomic(project / "paper_results/tables/main.csv", "1")
    runs.write_manifest()
    assert rewritten("rollout") and not rewritten("rollout")
    assert rewritten("oracle")
    files.write_atomic(project / "paper_results/tables/main.csv", "2")
    runs.write_manifest()
    assert not rewritten("oracle")
    record = files.read_json(runs.write_params("x", notebook, "cpu", {"start": "oracle"}))
    assert list(record["sources"]) == ["data/prices.yaml"]


def test_where_a_run_reads_from_does_not_make_it_stale(project):
    edit(project / "params/cpu.yaml", "[random", "[flat.s0.paper, random")
    play = {s.name: s for s in runs.plan("cpu", "rollout")}["40_play.flat.s0.paper"]
    finish("cpu", play)
    for start in ("oracle", "rollout"):
        states = {row["run"]: row["state"] for row in runs.status("cpu", start)}
        assert states[play.name] == "done", start


def test_a_pair_is_two_students_each_trained_once(project):
    pair = runs.parse_run("pair-program.s0.paper")
    assert pair.students == ["planner-program.s0", "executor-program.s0"]
    assert pair.student == "planner-program.s0+executor-program.s0"
    assert pair.plays == "hierarchical" and runs.parse_run("flat.s0.paper").plays == "flat"
    assert runs.parse_run("oracle.s0.paper").students == []
    with pytest.raises(ValueError, match="pair-TEACHER.*pair-program.s0.paper"):
        runs.parse_run("pair.s0.paper")
    rows = "[pair-program.s0.paper, pair-program.s0.swiftsage, flat.s0.paper, random"
    edit(project / "params/cpu.yaml", "[random", rows)
    steps = {s.name: s for s in runs.plan("cpu")}
    trained = ["30_train.planner-program.s0", "30_train.executor-program.s0"]
    assert [n for n in steps if n.startswith("30_")] == [*trained, "30_train.flat.s0"]
    assert steps["40_play.pair-program.s0.paper"].needs == tuple(trained)
    assert "20_annotate.program.train" in steps[trained[0]].needs
    assert steps[trained[1]].changes["student"] == "executor-program.s0"


def test_a_run_by_hand_without_a_profile_says_what_to_do(project):
    with pytest.raises(ValueError, match='expected a profile, got None. Try: profile = "smoke"'):
        runs.build(None)


# -- executing ---------------------------------------------------------------------------------


def fails(project, source, **options):
    sources = "print(profile, start)", source, "'never reached'"
    write_notebook(project / "nbs/experiments", "30_train", HEAD, *sources)
    with pytest.raises(runs.RunError) as caught:
        runs.run("30_train", "cpu", **options)
    kept = project / "build/cpu/notebooks/30_train.failed.ipynb"
    assert kept.exists() and str(kept.relative_to(project)) in str(caught.value)
    assert not (project / "build/cpu/notebooks/30_train.ipynb").exists()
    assert not runs.stamp_path("cpu", "30_train").exists()
    assert str(project) not in kept.read_text()
    return str(caught.value)


def test_a_failing_cell_is_named_and_its_copy_kept(project):
    message = fails(project, "salt = {}\nsalt['pepper']")
    assert "30_train" in message and "`salt = {}`" in message and "KeyError: 'pepper'" in message


def test_a_timeout_is_named(project):
    message = fails(project, "import time\ntime.sleep(90)", timeout=10)
    assert "`import time`" in message and "longer than 10 s" in message


def test_a_dead_kernel_is_reported_with_its_cause(project):
    message = fails(project, "import os\nos.kill(os.getpid(), 9)")
    assert "`import os`" in message and "SIGKILL" in message and "memory" in message
    message = fails(project, "import os\nos._exit(7)")
    assert "exit status 7" in message


def test_a_good_run_replaces_a_failed_one_and_hides_the_machine(project):
    fails(project, "1 / 0")
    source = f"import tqdm, time\nprint({str(project)!r} + '/data')\n"
    source += "for _ in tqdm.tqdm(range(30), mininterval=0): time.sleep(0.01)"
    write_notebook(project / "nbs/experiments", "30_train", HEAD, "profile, start", source)
    copy = runs.run("30_train", "cpu")
    text = copy.read_text()
    assert str(project) not in text and "data" in text
    assert "30/30" in text and " 1/30" not in text
    assert [p.name for p in copy.parent.iterdir()] == ["30_train.ipynb"]


def test_a_second_run_of_the_same_name_is_refused(project):
    with files.Lock(project / "build/cpu/locks/30_train.flat.s0"):
        with pytest.raises(RuntimeError, match=f"pid {os.getpid()} on host"):
            runs.run("30_train", "cpu", {"student": "flat.s0"}, "30_train.flat.s0")


# -- the whole line ----------------------------------------------------------------------------


def reproduce(*words, check=True):
    command = [SGD, "reproduce", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == check, text
    return text


def made_at(project):
    names = {p.stem: p.stat().st_mtime_ns for p in (project / "build/cpu/done").glob("*.json")}
    assert names
    return names


@pytest.mark.timeout(600)
def test_the_line_from_nothing_to_a_release_and_back(project):
    "Killed once on the way, made, released, made again from the release, altered, refused."
    command = [SGD, "reproduce", "--from", "oracle", "--rows", "all"]
    process = subprocess.Popen(
        command, env=ENV, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list(project.glob("build/cpu/done/10_*")):
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.1)
    with pytest.raises(RuntimeError, match="run in progress: pid"):
        runs.reproduce("cpu", "oracle", "all")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)
    kept = made_at(project)

    reproduce("--from", "oracle", "--rows", "all")
    again = made_at(project)
    assert all(again[name] == at for name, at in kept.items())
    assert {row["state"] for row in runs.status("cpu")} == {"done"}
    timing = files.read_json(project / "build/cpu/timing.json")
    assert timing["FROM=oracle ROWS=all"]["minutes"] > 0
    assert files.read_json(project / "build/cpu/clock.json") == {}

    rows = project / "build/cpu/episodes/random.s0.paper.jsonl.gz"
    rows.write_bytes(rows.read_bytes()[:20])
    states = {row["run"]: row["state"] for row in runs.status("cpu")}
    assert states.pop("40_play.random.s0.paper") == "damaged" and set(states.values()) == {"done"}
    text = reproduce("--from", "oracle", "--rows", "all")
    assert f"[{len(again)}/{len(again)}] " in text and "min so far" in text
    assert "40_play.random.s0.paper will be run again" in text and rows.name in text
    assert made_at(project)["40_play.oracle.s0.paper"] == again["40_play.oracle.s0.paper"]

    runs.release("cpu")
    assert runs.verify_release() > 5
    shutil.rmtree(project / "build")
    text = reproduce("--from", "rollout")
    found = files.read_json(project / "build/cpu/compare.json")
    assert list(found["runs"]) == ["random.s0.paper"]
    assert found["runs"]["random.s0.paper"]["equal"] == 3
    assert found["tables"]["tables/efficiency.csv"] == "measured"
    assert found["tables"]["tables/main.csv"] == found["tables"]["figures/main.csv"] == "same"
    assert "random.s0.paper: 3 of 3 episodes equal, mean +0.00" in text

    (project / "build/cpu/figures/main.csv").unlink()
    text = reproduce("--from", "rollout")
    assert "50_tables will be run again: build/cpu/figures/main.csv is missing" in text
    assert (project / "build/cpu/figures/main.csv").exists()

    reproduce("--from", "tables")
    compare = [SGD, "compare", "--from", "tables", "--rows", "main", "--strict"]
    assert subprocess.run(compare, env=ENV).returncode == 0
    (project / "build/cpu/figures/main.csv").unlink()
    done = subprocess.run(compare, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and "missing: figures/main.csv" in done.stdout

    released = project / "paper_results/runs/cpu/oracle.s0.paper.jsonl.gz"
    released.write_bytes(released.read_bytes()[:20])
    text = reproduce("--from", "tables", check=False)
    assert "oracle.s0.paper.jsonl.gz: changed since the release" in text and "Try" in text


LONG = "import subprocess, time\nsubprocess.Popen(['sleep', '300'])\nprofile, start, split\n"


def processes(project):
    "All processes that work in this folder."
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(project) and process.pid != os.getpid():
                found.append(process)
    return found


@pytest.fixture
def long_run(project):
    "`sgd reproduce` in the middle of a notebook that takes minutes."
    cells = LONG + "open('begun', 'w').close()\ntime.sleep(300)"
    write_notebook(project / "nbs/experiments", "10_oracle", HEAD + "split: str = None", cells)
    process = subprocess.Popen(
        [SGD, "reproduce", "--from", "oracle", "--rows", "all"],
        env=ENV,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (project / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    yield process
    for left in processes(project):
        left.kill()
    process.wait()


def test_a_killed_command_leaves_the_build_folder_taken(project, long_run):
    long_run.kill()
    long_run.wait()
    with pytest.raises(RuntimeError, match="run in progress: .*Snakemake is pid"):
        runs.reproduce("cpu", "oracle", "all")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_ends_all_that_it_started(project, long_run, number):
    assert len(processes(project)) > 3
    long_run.send_signal(number)
    message = long_run.communicate(timeout=300)[1]
    assert long_run.returncode == 1 and "sgd: stopped. Run the same command again" in message
    assert processes(project) == []
    assert files.read_json(project / "build/cpu/clock.json")["FROM=oracle ROWS=all"] > 0
    with files.Lock(project / "build/cpu"):
        pass


def test_progress_says_how_many_are_left_and_how_long(project):
    steps = runs.plan("cpu", "oracle", "all")
    progress = runs.Progress("cpu", steps)
    unknown = "time left unknown: the release has no time of this profile"
    assert f"[0/{len(steps)}] done, {unknown}" in progress.first()
    assert progress.news(1) == []
    finish("cpu", steps[0])
    line = f"[1/{len(steps)}] {steps[0].name} done, 1.5 min so far, {unknown}"
    assert progress.news(1.5)[0].startswith(line) and progress.news(2) == []
    for step in steps:
        path = project / f"paper_results/notebooks/{step.name}.ipynb"
        files.write_json(path, {"metadata": {"papermill": {"duration": 1.5}}})
    assert unknown in runs.Progress("cpu", steps).first(), "the notebook may have run for nothing"
    for name, seconds in (("oracle", 600), ("random", 120)):
        rows = runs.released(f"episodes/{name}.s0.paper.jsonl.gz", "cpu")
        files.write_jsonl(rows, [])
        files.write_sidecar(rows, "files.toy", {}, seconds=seconds)
    progress = runs.Progress("cpu", steps)
    assert progress.first().endswith("at most about 12 min left")
    assert unknown in runs.Progress("smoke", runs.plan("smoke", "oracle", "all")).first()


@pytest.fixture
def real(tmp_path, monkeypatch):
    "What `sgd reproduce` says of a real plan from nothing; then after each run, a minute apart."
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs, "stamp_path", lambda profile, name: tmp_path / profile / name)

    def lines(profile, start, apart=1.0):
        steps = runs.plan(profile, start, "main")
        progress = runs.Progress(profile, steps, runs.timed_minutes(profile, start, "main"))
        told = [progress.first()]
        for number, step in enumerate(steps, 1):
            files.write_json(runs.stamp_path(profile, step.name), {})
            told += progress.news(apart * number)
        assert len(told) == len(steps) + 1 and "left" not in told[-1]
        return told

    return lines


def minutes_left(line):
    return float(line.split(" min left")[0].split()[-1])


def test_a_timed_profile_shows_its_own_whole_minutes_as_left(real):
    for profile, start, apart in (("cpu", "rollout", 3.3), ("smoke", "oracle", 0.45)):
        whole = runs.timed_minutes(profile, start, "main")
        left = [minutes_left(line) for line in real(profile, start, apart)[:-1]]
        assert left[0] == round(whole) and left == sorted(left, reverse=True)
        assert all(n <= max(1, round(whole - apart * i)) for i, n in enumerate(left))


def test_from_oracle_the_untimed_collecting_is_not_counted_as_nothing(real):
    told = real("cpu", "oracle")
    if runs.timed_minutes("cpu", "oracle", "main"):
        assert minutes_left(told[0]) == round(runs.timed_minutes("cpu", "oracle", "main"))
        return
    assert "min left, not counting runs of unknown time: 2" in told[0] and "at most" in told[0]
    assert told[2].endswith("min left") and minutes_left(told[2]) > 30


@pytest.mark.parametrize("start", ["rollout", "oracle"])
def test_a_profile_that_was_never_timed_shows_no_minutes_of_another(real, start):
    if (ROOT / "paper_results/runs/paper").exists():
        pytest.skip("the paper profile is in the release")
    told = real("paper", start)
    last = max(n for n, line in enumerate(told) if "40_play." in line)
    assert all("time left unknown" in line for line in told[:last])
    assert not any("min left" in line for line in told[:last])


def test_a_failed_run_is_named_and_the_others_go_on(project):
    write_notebook(
        project / "nbs/experiments", "10_oracle", HEAD + "split: str = None", "1 / 0\nsplit"
    )
    edit(project / "nbs/experiments/10_oracle.ipynb", "1 / 0", "profile, start, 1 / 0")
    text = reproduce("--from", "oracle", "--rows", "all", check=False)
    assert "build/cpu/notebooks/10_oracle.test.failed.ipynb" in text and "ZeroDivisionError" in text
    assert (project / "build/cpu/episodes/random.s0.paper.jsonl.gz").exists()


# -- the comparison ----------------------------------------------------------------------------

MAIN = "profile,protocol,agent,teacher,class,score,ci_low,ci_high\n"


@pytest.fixture
def compared(project):
    "A release with tables and one row, and a build with the same ones."
    main = MAIN + "cpu,paper,flat,,all,15.00,12.00,18.00\ncpu,paper,random,,all,1.00,0.00,2.00\n"
    rows = [{"task": "boil", "variation": v, "score": 10 * v, "wall_s": 1} for v in range(4)]
    tops = project / "build/cpu", project / "paper_results"
    for tables in (tops[0] / "tables", tops[1] / "tables"):
        for name, text in {"main": main, "efficiency": "1", "simulator": "1"}.items():
            files.write_atomic(tables / f"{name}.csv", text)
    for figures in (tops[0] / "figures", project / "figures"):
        files.write_atomic(figures / "per_task.csv", "1")
    for top in (tops[0] / "episodes", tops[1] / "runs/cpu"):
        files.write_jsonl(top / "flat.s0.paper.jsonl.gz", rows)
    return project


def test_tables_and_figures_of_both_sides_are_compared(compared):
    built = compared / "build/cpu"
    found = runs.compare("cpu", "tables", "main")
    assert found["runs"] == {} and runs.is_same(found)
    assert set(found["tables"].values()) == {"same", "measured"}
    files.write_atomic(built / "tables/efficiency.csv", "2")
    assert runs.compare_tables("cpu", "tables")["tables/efficiency.csv"] == "differs"
    assert runs.compare_tables("cpu", "rollout")["tables/efficiency.csv"] == "measured"
    for name in ("figures/per_task.csv", "tables/simulator.csv"):
        (built / name).unlink()
    files.write_atomic(built / "tables/more.csv", "1")
    found = runs.compare("cpu", "rollout", "main")
    assert found["tables"]["figures/per_task.csv"] == "missing"
    assert found["tables"]["tables/more.csv"] == "new"
    assert "tables/simulator.csv" not in found["tables"] and not runs.is_same(found)
    assert "missing: figures/per_task.csv; new: tables/more.csv" in runs.verdicts(found)[-1]
    edit(compared / "params/cpu.yaml", "  others:", "  studies: [05_simulator]\n  others:")
    write_notebook(compared / "nbs/experiments", "05_simulator", HEAD, "profile, start")
    assert runs.compare_tables("cpu", "oracle", "all")["tables/simulator.csv"] == "missing"


def test_the_difference_of_a_run_is_held_against_its_interval(compared):
    path = compared / "build/cpu/episodes/flat.s0.paper.jsonl.gz"
    rows = files.read_jsonl(path)
    for score, inside in ((38, True), (80, False)):
        files.write_jsonl(path, rows[:3] + [rows[3] | {"score": score}])
        found = runs.compare("cpu")
        assert found["runs"]["flat.s0.paper"]["within"] is inside
        assert runs.is_same(found) is inside
        line = runs.verdicts(found)[0]
        assert f"3 of 4 episodes equal, mean {(score - 30) / 4:+.2f}" in line
        assert f"boil/3 30 -> {score}" in line and ("OUTSIDE" in line) is not inside
    (compared / "paper_results/tables/main.csv").unlink()
    assert runs.compare("cpu")["runs"]["flat.s0.paper"]["within"] is None


def test_a_profile_without_a_release_is_not_compared(compared):
    with pytest.raises(FileNotFoundError, match="released profile, got 'smoke'"):
        runs.compare("smoke")


# -- the release -------------------------------------------------------------------------------


@pytest.fixture
def released(project):
    "A release of one row and one student, with all that is needed to check it."
    student = project / "paper_results/students/cpu/flat.s0"
    files.write_json(student / "training.json", {"seconds": 1})
    files.write_sidecar(student, "files.toy", {})
    row = project / "paper_results/runs/cpu/flat.s0.paper.jsonl.gz"
    files.write_jsonl(row, [{"task": "boil", "variation": 0, "score": 3}])
    files.write_sidecar(row, "files.toy", {}, [student])
    files.write_json(project / "data/oracle/train.json", {"some": "thing"})
    runs.write_manifest()
    assert runs.verify_release() == 5
    return project


@pytest.mark.parametrize("same", [True, False])
def test_released_paths_are_played_again_on_request(released, monkeypatch, capsys, same):
    played = []

    def verify_sample(path, n, seed, workers):
        played.append((path.name, n, seed))
        return [{"task": "boil", "variation": i, "same": same or i < 1} for i in range(n)]

    monkeypatch.setattr(runs, "verify_sample", verify_sample)
    for split in ("dev", "test", "train"):
        files.write_jsonl(released / f"data/oracle/{split}.jsonl.gz", [])
    runs.write_manifest()
    cli.main(["verify"])
    assert not played
    if same:
        cli.main(["verify", "--replay", "3", "--seed", "7"])
        assert "3 oracle paths" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="got others in\ndev.jsonl.gz: boil/1$"):
            cli.main(["verify", "--replay", "3", "--seed", "7"])
    assert played == [("dev.jsonl.gz", 2, 7), ("train.jsonl.gz", 1, 7)]


def test_no_release_says_what_to_do(project):
    with pytest.raises(FileNotFoundError, match="MANIFEST.json.*FROM=oracle"):
        runs.verify_release()


def test_altered_missing_and_added_files_are_named(released):
    (released / "data/oracle/train.json").write_text("{}")
    with pytest.raises(ValueError, match="data/oracle/train.json: changed"):
        runs.verify_release()
    (released / "data/oracle/train.json").unlink()
    with pytest.raises(ValueError, match="data/oracle/train.json: missing"):
        runs.verify_release()
    runs.write_manifest()
    (released / "data/oracle/extra.csv").write_text("1")
    with pytest.raises(ValueError, match="data/oracle/extra.csv: not in the manifest"):
        runs.verify_release()


def test_rows_of_another_student_are_stale(released):
    files.write_json(released / "paper_results/students/cpu/flat.s0/training.json", {"seconds": 2})
    runs.write_manifest()
    with pytest.raises(ValueError, match="flat.s0.paper.jsonl.gz: made from another flat.s0"):
        runs.verify_release()


def test_a_smoke_run_is_no_release(project):
    with pytest.raises(ValueError, match="smoke"):
        runs.release("smoke")


def test_another_profile_does_not_overwrite_the_release(project):
    with pytest.raises(ValueError, match="profile cpu.*got 'paper'"):
        runs.release("paper")
    assert not (project / "build/paper").exists()


@pytest.fixture
def finished(project):
    "A build in which every run of the plan has ended."
    steps = {step.name: step for step in runs.plan("cpu")}
    for step in steps.values():
        if not step.name.startswith("70_"):
            finish("cpu", step)
    assert {row["state"] for row in runs.status("cpu")} == {"done"}
    return project


def test_rows_that_the_build_does_not_have_leave_the_release(finished):
    shelf = finished / "paper_results"
    for old in ("runs/cpu/gone.s0.paper.jsonl.gz", "students/cpu/gone.s0/training.json"):
        files.write_atomic(shelf / old, "old")
    by_hand = files.write_atomic(finished / "figures/README.md", "by hand")
    runs.release("cpu")
    runs.verify_release()
    assert sorted(p.name for p in (shelf / "runs/cpu").glob("*.gz")) == [
        "oracle.s0.paper.jsonl.gz",
        "random.s0.paper.jsonl.gz",
    ]
    assert not (shelf / "students/cpu/gone.s0").exists() and by_hand.exists()


def test_nothing_is_copied_if_a_row_is_too_large(finished, monkeypatch):
    monkeypatch.setattr(runs, "ROW_LIMIT", 10)
    with pytest.raises(ValueError, match="random.s0.paper.jsonl.gz: .* at most 10"):
        runs.release("cpu")
    assert not (finished / "data/oracle").exists() and not (finished / "paper_results").exists()


def test_released_minutes_stay_unless_newer_ones_were_measured(finished):
    shelf = finished / "paper_results/timing/cpu.json"
    old = {"minutes": 9.0, "made": "2024-01-02"}
    files.write_json(shelf, {"FROM=tables": old, "FROM=rollout": old})
    fresh = {"FROM=tables": {"minutes": 2.0, "made": "2024-01-03"}, "FROM=oracle": old}
    older = {"FROM=rollout": {"minutes": 1.0, "made": "2024-01-01"}}
    files.write_json(finished / "build/cpu/timing.json", fresh | older)
    runs.release("cpu")
    runs.verify_release()
    minutes = {words: r["minutes"] for words, r in files.read_json(shelf).items()}
    assert minutes == {"FROM=tables": 2.0, "FROM=rollout": 9.0, "FROM=oracle": 9.0}


def test_minutes_of_another_clone_are_taken_over(project, tmp_path):
    clone = tmp_path / "clone"
    new = {"minutes": 25.0, "made": "2024-02-01"}
    files.write_json(clone / "build/cpu/timing.json", {"FROM=rollout": new})
    files.write_json(project / "build/cpu/timing.json", {"FROM=oracle": new})
    for folder in (clone, clone / "build", clone / "build/cpu"):
        assert runs.import_timing(folder) == [project / "build/cpu/timing.json"]
    found = files.read_json(project / "build/cpu/timing.json")
    assert found == {"FROM=oracle": new, "FROM=rollout": new}
    with pytest.raises(FileNotFoundError, match="timing.json.*another clone"):
        runs.import_timing(clone / "build/cpu/tables")


def test_sessions_of_one_run_add_up(project):
    steps = runs.plan("cpu", "oracle", "all")
    first = runs.Clock("cpu", "oracle", "all", steps)
    first.begun -= 600
    first.tick()
    finish("cpu", steps[0])
    second = runs.Clock("cpu", "oracle", "all", steps)
    second.begun -= 300
    assert round(second.minutes) == 5 and round(second.total) == 15
    assert runs.Clock("cpu", "oracle", "main", steps).total is None
    second.tick(done=True)
    assert runs.Clock("cpu", "oracle", "all", steps).total is None
    shutil.rmtree(project / "build")
    assert round(runs.Clock("cpu", "oracle", "all", steps).total, 1) == 0


def test_an_unfinished_build_is_no_release(project):
    with pytest.raises(ValueError, match="10_oracle.test: missing"):
        runs.release("cpu")


def test_a_start_that_needs_a_release_says_so(project):
    with pytest.raises(FileNotFoundError, match="paper_results/students/cpu/flat.s0.*FROM=train"):
        runs.place("students/flat.s0", "cpu", "rollout")
