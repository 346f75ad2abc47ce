"""Made-up episode rows for tests of tables and costs. Scores are dice: they say nothing of any agent."""

import os
import shutil
import subprocess

import numpy as np

from sgd.files import root, write_jsonl, write_sidecar

SHA = "0123456789ab"
WIDTHS = {"3-1": 5, "4-2": 4, "7-1": 3, "2-1": 3, "8-1": 2, "1-1": 3, "10-2": 2}
PARAMS = {"oracle": 0, "random": 0, "flat": 1_000_000, "hierarchical": 1_010_000}


def write_run(folder, agent, teacher="", seed=0, better=0, protocol="paper", profile="cpu", **more):
    "Write the rows of one agent and seed with their sidecar; gives the path of the rows."
    learns = agent in ("flat", "hierarchical")
    sha = SHA[::-1] if protocol != "paper" else SHA
    facts = {
        "profile": profile,
        "protocol": {"name": protocol, "sha": sha, "max_moves": 100, "action_aid": "none"},
        "agent": agent,
        "teacher": teacher,
        "data": "gold",
        "layout": "stream" if learns else "",
        "memory": "all" if learns else "",
        "seed": seed,
        "params": PARAMS[agent],
        "student": f"{agent}{'-' * bool(teacher)}{teacher}.s{seed}" if learns else "",
        "action_aid": "none",
    } | more
    rng = np.random.default_rng([seed, len(agent), better])
    rows = []
    for task, width in WIDTHS.items():
        for variation in range(width):
            score = int(min(100, rng.integers(0, 12) * 10 + better))
            rows.append(
                {
                    "agent": agent,
                    "seed": seed,
                    "protocol": sha,
                    "task_id": task,
                    "variation": variation,
                    "score": score,
                    "success": score == 100,
                    "actions": int(rng.integers(5, 50)),
                    "moves": 10,
                    "tokens_in": int(rng.integers(500, 900)) if learns else 0,
                    "tokens_out": int(rng.integers(50, 90)) if learns else 0,
                    "llm_calls": 0,
                    "wall_s": 1.5,
                    "steps": [],
                }
            )
    name = f"{agent}{'-' * bool(teacher)}{teacher}.s{seed}.{protocol}"
    path = folder / f"{name}.jsonl.gz"
    write_jsonl(path, rows)
    params = {"width": 8}
    write_sidecar(path, "stats.simulated", params, seed=seed, run=facts, seconds=len(rows) / 2)
    return path


def write_runs(folder, seeds=(0, 1)):
    "An oracle, a random agent, and students with several seeds."
    write_run(folder, "oracle", better=90)
    write_run(folder, "oracle", better=90, protocol="swiftsage")
    write_run(folder, "random")
    for seed in seeds:
        write_run(folder, "flat", seed=seed)
        write_run(folder, "hierarchical", "program", seed=seed, better=20)
        write_run(folder, "hierarchical", "random", seed=seed, better=10)
    return folder


def git(home, *words):
    "A git command in a folder, by nobody in particular."
    nobody = {
        f"GIT_{who}_{what}": "nobody"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    subprocess.run(
        ["git", "-C", home, *words], check=True, capture_output=True, env=os.environ | nobody
    )


def make_project(home):
    "A project in git with the published numbers: what is written there has a commit and a place."
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(root() / "settings.ini", home)
    shutil.copytree(root() / "paper_results" / "reported", home / "paper_results" / "reported")
    git(home, "init", "--quiet")
    git(home, "add", ".")
    git(home, "commit", "--quiet", "--message", "begin")
    return home


PLACES = {"rows": "paper_results/runs/cpu", "tables": "paper_results/tables", "figures": "figures"}
PLACES |= {"students": "paper_results/students/cpu"}
PLACES |= {"oracle": "data/oracle", "annotations": "data/annotations"}


def release(home):
    "Move what was built to where a release puts it; the build folder is gone."
    for kind, place in PLACES.items():
        if (home / "build" / "cpu" / kind).exists():
            shutil.copytree(home / "build" / "cpu" / kind, home / place, dirs_exist_ok=True)
    shutil.rmtree(home / "build")
    return home
