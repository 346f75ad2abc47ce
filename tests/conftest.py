"""Fixtures shared by the tests; slow imports are left to the fixtures that need them."""

import os
import signal
from pathlib import Path

import pytest
import workers

from sgd.files import read_jsonl, root, write_jsonl
from sgd.layouts import stream_pieces
from sgd.teachers import make_teacher
from sgd.world import Pool, Simulator

# A shell's background job ignores Ctrl-C, and its children inherit that; ours must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes ten seconds or more; part of `make test`")


@pytest.fixture(scope="session")
def oracle_folder() -> Path:
    "The released trajectories, or those of another collection."
    return Path(os.environ.get("SGD_TEST_ORACLE", root() / "data/oracle"))


@pytest.fixture(scope="session")
def released(oracle_folder) -> dict[str, list[dict]]:
    "Trajectories by split."
    return {s: read_jsonl(oracle_folder / f"{s}.jsonl.gz") for s in ("train", "dev")}


@pytest.fixture(scope="session")
def one_each(released) -> dict[str, dict]:
    "The first train trajectory of every task."
    return {t["task"]: t for t in reversed(released["train"])}


@pytest.fixture(scope="session")
def annotated(released) -> list[tuple[dict, list[dict]]]:
    "Every train and dev trajectory with the segments of the labelling program."
    teacher = make_teacher("program")
    rows = released["train"] + released["dev"]
    return [(t, teacher.annotate(t)["segments"]) for t in rows]


@pytest.fixture(scope="session")
def sim():
    "A playing simulator."
    with Simulator(memory_mb=768) as s:
        yield s


@pytest.fixture(scope="session")
def pool():
    "Two simulators in processes of their own."
    with Pool(2, memory_mb=512) as p:
        yield p


@pytest.fixture(scope="session")
def tokenizer(released):
    "A tokenizer of the train split in hierarchical streams."
    import torch

    from sgd.students import train_tokenizer

    torch.set_num_threads(1)
    teacher = make_teacher("program")
    return train_tokenizer(
        p.text
        for t in released["train"]
        for pieces in stream_pieces(t, teacher.annotate(t)["segments"])
        for p in pieces
    )


@pytest.fixture(scope="session")
def small(released, tmp_path_factory) -> dict[str, Path]:
    "Files of a small data set: trajectories and annotations of three tasks, train and dev."
    folder, teacher, paths = tmp_path_factory.mktemp("small"), make_teacher("program"), {}
    for split, rows in released.items():
        few = [
            t
            for name in workers.FAST
            for t in [r for r in rows if r["task"] == name][: 6 if split == "train" else 1]
        ]
        paths[split] = write_jsonl(folder / f"{split}.jsonl", few)
        notes = [teacher.annotate(t) for t in few]
        paths[f"{split}_notes"] = write_jsonl(folder / f"program.{split}.jsonl", notes)
    return paths


@pytest.fixture(scope="session")
def students(tokenizer, tmp_path_factory) -> dict[str, Path]:
    "Folders of untrained students: flat, hierarchical, planner and executor."
    from sgd.students import Student, new_model

    folder = tmp_path_factory.mktemp("students")
    roles = {"flat": ("act",), "hierarchical": ("plan", "act")}
    roles |= {"planner": ("plan",), "executor": ("act",)}
    return {
        name: Student(new_model(workers.LFM2, tokenizer, seed=k), tokenizer, r).save(folder / name)
        for k, (name, r) in enumerate(roles.items())
    }
