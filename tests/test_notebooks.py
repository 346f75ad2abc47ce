"""Run notebooks, their parameters and their executed copies agree; library notebooks tell a story."""

import ast
import json
import re

import pytest

from sgd import runs
from sgd.files import root

RUNS = sorted(runs.experiments().values())
LIBRARY = sorted((root() / "nbs").glob("[0-9]*.ipynb"))
DONE = sorted((root() / "paper_results" / "notebooks").glob("*.ipynb"))
PROFILES = runs.profile_names()


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def text(cell):
    return "".join(cell["source"])


def stem(path):
    return path.stem


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_a_run_notebook_declares_and_reads_its_parameters(path):
    declared = runs.parameters(path)
    assert set(declared) <= runs.names_read(path)
    cell = next(c for c in load(path)["cells"] if "parameters" in c["metadata"].get("tags", []))
    for line in text(cell).splitlines():
        assert re.search(r"^\w+: [\w\[\], |]+ = .+  # \S", line), f"{path.stem}: {line}"
    assert not any("#| export" in text(c) for c in load(path)["cells"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("start", runs.STAGES)
def test_every_run_of_every_profile_has_good_parameters(profile, start):
    for step in runs.plan(profile, start, "all"):
        notebook = runs.find_notebook(step.notebook)
        assert runs.resolve(notebook, profile, step.changes)


@pytest.mark.parametrize("path", DONE, ids=stem)
def test_an_executed_copy_is_of_todays_notebook(path):
    nb, source = load(path), runs.find_notebook(path.name.split(".")[0])
    ran = [
        text(c) for c in nb["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])
    ]
    assert ran == [text(c) for c in load(source)["cells"]]
    assert not nb["metadata"]["papermill"]["exception"]
    assert set(nb["metadata"]["papermill"]["parameters"]) <= set(runs.parameters(source))


@pytest.mark.parametrize("path", LIBRARY, ids=stem)
def test_a_library_notebook_tells_a_story(path):
    cells = load(path)["cells"]
    first = next(c for c in cells if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n+> .+", text(first)), f"{path.stem}: expected a title and `> summary`"
    code = [text(c) for c in cells if c["cell_type"] == "code"]
    exported = [s for s in code if s.startswith("#| export")]
    lessons = [s for s in code if s.strip() and not s.startswith("#|")]
    assert all(len(s.splitlines()) <= 46 for s in exported), "an exported cell has at most 45 lines"
    shown = [s for s in lessons if isinstance(ast.parse(plain(s)).body[-1], ast.Expr)]
    assert shown or not exported


def plain(source):
    "Code without the lines that only IPython reads."
    return re.sub(r"^\s*[%!].*$", "", source, flags=re.M) or "None"


@pytest.mark.parametrize("path", LIBRARY + RUNS, ids=stem)
def test_stored_outputs_are_small_and_name_no_machine(path):
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    outputs = json.dumps([c["outputs"] for c in cells])
    pictures = re.sub(r'"image/\w+": "[^"]*"', "", outputs)
    assert len(pictures) <= 60_000 and len(outputs) <= 400_000
    assert not re.search(r"/(root|home|Users|tmp|work)/", pictures), f"{path.stem}: a machine path"


@pytest.mark.parametrize("path", LIBRARY + RUNS + DONE, ids=stem)
def test_no_error_is_stored(path):
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    kinds = [o["output_type"] for c in cells for o in c["outputs"]]
    assert "error" not in kinds
