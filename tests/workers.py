"""What tests run in other processes, importable by name, and means to stop it at a bad moment."""

import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

FAST = ["find-animal", "lifespan-longest-lived", "chemistry-mix-paint-secondary-color"]
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 128}
LFM2 = {"model_type": "lfm2", "num_hidden_layers": 2, "full_attn_idxs": [1], **SIZES}
LFM2 |= {"conv_L_cache": 4, "block_auto_adjust_ff_dim": False}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 4096, **SIZES}


def javas(processes) -> list[psutil.Process]:
    "Those of the processes that are running JVMs."
    found = []
    for p in processes:
        try:
            if p.name() == "java" and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except psutil.NoSuchProcess:
            pass
    return found


def in_session(sid: int) -> list[psutil.Process]:
    "All processes of a session, orphans too."
    found = []
    for p in psutil.process_iter():
        try:
            if os.getsid(p.pid) == sid:
                found.append(p)
        except (ProcessLookupError, PermissionError):
            pass
    return found


def until(condition, seconds: float = 10):
    "Wait for a condition; its last value."
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def script(code: str, folder: Path) -> subprocess.Popen:
    "Start a script in a session of its own."
    path = Path(folder) / "script.py"
    path.write_text(code)
    return subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def jvm_pid(sim) -> int:
    "Which process is the worker's simulator?"
    return sim.gateway.java_process.pid


def same_text(sim, task, variation, actions) -> list[dict]:
    "The steps of a path as this simulator plays it."
    from sgd.oracle import play_path

    return play_path(sim, task, variation, actions)["steps"]


def preloaded():
    "A context whose processes begin with the slow imports done."
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["sgd.rollout", "sgd.training", "sgd.oracle"])
    return context


def interrupted(
    target,
    args: tuple,
    ready,  # grows when something is safe on the disk
    kills: int,
    wait: float = 1.0,  # seconds, at most, from there to the kill
    seed: int = 0,
) -> int:
    "Run `target` again and again, kill -9 it `kills` times at random; how often it was killed."
    rng, killed = random.Random(seed), 0
    while True:
        before = ready()
        process = preloaded().Process(target=target, args=args)
        process.start()
        if killed < kills:
            until(lambda: ready() > before or not process.is_alive(), 60)
            process.join(rng.uniform(0, wait))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
        process.join(120)
        if process.exitcode == 0:
            return killed
        assert process.exitcode == -signal.SIGKILL, process.exitcode


def size(path: Path) -> int:
    "Bytes of a file that may not exist."
    return path.stat().st_size if path.exists() else 0


def fragile(sim, task: str, variation: int, mark: str) -> str:
    "The task of a variation; for odd ones, the JVM or the worker is killed the first time."
    if variation % 2 and not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid() if variation == 1 else jvm_pid(sim), signal.SIGKILL)
    return sim.load(task, variation).observation


def changed(path: Path) -> int:
    "When a file was last written, in nanoseconds; 0 if it is not there."
    return path.stat().st_mtime_ns if path.exists() else 0
