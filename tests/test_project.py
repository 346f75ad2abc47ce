"""The project holds together: drift, packaging, help, errors of a wrong place."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
SKIP = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


def sh(*words, cwd=ROOT, env=ENV):
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def small_copy(tmp_path_factory):
    "A project with one notebook, enough to drift."
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copy(ROOT / "README.md", folder)
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "00_files.ipynb", folder / "nbs")
    (folder / "sgd").mkdir()
    shutil.copy(ROOT / "sgd" / "__init__.py", folder / "sgd")
    done = sh("nbdev_export", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_drift_check_passes_and_fails(small_copy):
    assert sh(ROOT / ".ci" / "drift", small_copy).returncode == 0
    module = small_copy / "sgd" / "files.py"
    good = module.read_text()
    module.write_text(good.replace("Whole or not", "Half or not") + "\nEDITED = 1\n")
    done = sh(ROOT / ".ci" / "drift", small_copy)
    assert done.returncode == 1
    assert "sgd/files.py" in done.stdout and "nbdev_export && nbdev_clean" in done.stdout
    module.write_text(good)
    notebook = small_copy / "nbs" / "00_files.ipynb"
    nb = json.loads(notebook.read_text())
    nb["cells"][0]["metadata"]["collapsed"] = True
    notebook.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n")
    done = sh(ROOT / ".ci" / "drift", small_copy)
    assert done.returncode == 1 and "00_files.ipynb" in done.stdout


def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_made_from_its_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme().readme(), "make readme"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert re.match(r"[a-z]+:", target) or (ROOT / target.split("#")[0]).exists(), target


def test_a_dead_link_is_an_error():
    with pytest.raises(SystemExit, match="dead link"):
        re.sub(r"(\[[^\]]*\])\(([^)]+)\)", readme().rewrite, "[a](nowhere.ipynb)")


def test_the_numbers_of_the_readme_are_those_of_the_release():
    nb = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    space = {}
    for cell in nb["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "hide-input" not in tags:
            continue
        source = "".join(cell["source"])
        if "numbers" not in tags:
            exec(source, space)
            continue
        *before, last = source.split("\nMarkdown(")
        exec("\n".join(before), space)
        now = eval("Markdown(" + last.removeprefix("Markdown("), space)
        stored = "".join(cell["outputs"][0]["data"]["text/markdown"]) if cell["outputs"] else ""
        assert now.data.strip() == stored.strip(), "run nbs/index.ipynb, then `make readme`"


def test_a_wheel_without_the_project_says_what_to_do(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "sgd", site / "sgd", ignore=SKIP)
    code = "from sgd.files import root\nroot()"
    done = sh(sys.executable, "-c", code, cwd=tmp_path, env=ENV | {"PYTHONPATH": str(site)})
    last = done.stderr.strip().splitlines()[-1]
    assert "wheel has no data/" in last and "clone the repository" in last and str(site) in last


def test_the_package_is_found_from_any_working_directory(tmp_path):
    done = sh(sys.executable, "-c", "import sgd.files as f; print(f.root())", cwd=tmp_path)
    assert done.stdout.strip() == str(ROOT)


def test_the_command_says_what_went_wrong_in_one_line(tmp_path):
    for words, said in [
        (["run", "40_plya"], "Try: '40_play'"),
        (["status", "--profile", "smok"], "Try: 'smoke'"),
        (["reproduce", "--from", "rolout"], "expected FROM to be one of"),
        (["run", "40_play", "--set", "seed"], "name=value"),
    ]:
        done = sh("sgd", *words, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.startswith("sgd: ") and said in done.stderr


def test_make_help_lists_every_target():
    said = sh("make", "help").stdout
    for target in ("test", "reproduce", "lab", "release", "status", "verify"):
        assert re.search(rf"^{target} ", said, flags=re.M), target


def test_constraints_pin_everything_that_is_asked_for():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    wanted = parser["DEFAULT"]["requirements"] + " " + parser["DEFAULT"]["dev_requirements"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for requirement in wanted.split():
        name = re.split(r"[<>=!\[]", requirement)[0].lower()
        assert name.replace("_", "-") in {p.replace("_", "-") for p in pins}, name
    assert pins["torch"] == "2.13.0"
    assert not any(re.search(r"@|file:|/", line) for line in lines if not line.startswith("#"))


def test_metadata_files_are_readable():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "MIT"
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"] == "sgd"
    for name in ("default", "slurm"):
        assert yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())["keep-going"]


MACHINE = re.compile(r"/(work|root|home)/\w|127\.0\.0\.1:\d{4,}/simple|site-packages/")


def test_no_file_of_the_project_names_a_machine():
    listed = sh("git", "ls-files").stdout.split()
    if not listed:
        pytest.skip("not a git tree")
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".ini", ".json", ".cff", ".txt", ""):
            if path.is_file() and "test" not in name:
                found = MACHINE.search(path.read_text(encoding="utf-8", errors="replace"))
                assert not found, f"{name}: {found and found[0]}"
