"""R6: an episode is the same however it is played: alone, beside others, after a kill, with a new simulator."""

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import workers

from sgd import rollout
from sgd.agents import Agent, Decision, OracleAgent, StreamAgent, nearest_action
from sgd.files import read_jsonl, root, sidecar
from sgd.report import write_tables
from sgd.rollout import Rollout, episode_list, final_score, make_agent, play, stop_reason
from sgd.students import load_student
from sgd.world import Pool, Protocol, State, protocol, refused

RULES = {"split": "train", "per_task": 2, "max_moves": 12, "max_actions": 12}
REPORTED = root() / "paper_results/reported"
MANY = {**RULES, "per_task": 6}


def played(out: Path, student: Path, **more) -> None:
    "Short episodes of an untrained student."
    facts = {"profile": "t", "teacher": "program", "data": "gold", "layout": "stream"}
    facts |= {"memory": "all"}
    args = (out, student.name, protocol(**MANY), [student])
    play(*args, tasks=workers.FAST, width=2, facts=facts, **more)


def told(row: dict) -> dict:
    "A row without its seconds."
    return {k: v for k, v in row.items() if k != "wall_s"}


class Script(Agent):
    "Plays written actions; `hooks` run before some of them."

    name = "script"

    def __init__(self, actions: list[str], hooks: dict | None = None):
        self.actions, self.hooks, self.at, self.forcings = actions, hooks or {}, {}, []

    def start(self, slot, episode):
        self.at[slot] = 0

    def act(self, slots, valid):
        out = {}
        for s in slots:
            k = self.at[s]
            if hook := self.hooks.pop(k, None):
                hook(s)
            out[s] = Decision(self.actions[k] if k < len(self.actions) else None)
            self.at[s] += 1
        return out

    def forced(self, slot, action):
        self.forcings.append(action)


def rows_of(agent: Agent, pool: Pool, jobs: list, **rules) -> list[dict]:
    "Rows of some episodes."
    return list(Rollout(agent, protocol(**{**RULES, **rules}), pool, {}).run_all(jobs))


@pytest.mark.slow
def test_killed_at_random_points_the_rows_equal_those_of_an_uninterrupted_run(students, tmp_path):
    name = "hierarchical-program.s0.paper.jsonl.gz"
    whole, cut = tmp_path / "whole" / name, tmp_path / "cut" / name
    student = students["hierarchical"]
    assert workers.interrupted(played, (whole, student), lambda: 0, kills=0) == 0
    part = cut.with_name(cut.name + ".part")
    killed = workers.interrupted(
        played, (cut, student), lambda: workers.size(part), kills=10, wait=0.2
    )
    assert killed >= 8
    a, b = read_jsonl(whole), read_jsonl(cut)
    assert len(a) == 18
    assert list(map(told, a)) == list(map(told, b))
    assert not list(cut.parent.glob("*.part"))
    tables = [write_tables(p.parent, REPORTED, p.parent, tmp_path / "f") for p in (whole, cut)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_an_episode_alone_equals_the_episode_in_a_batch(pool, students, name):
    jobs = episode_list(protocol(**RULES), workers.FAST[:2])
    agent = StreamAgent([load_student(students[name])], width=4)
    crowd = {(r["task"], r["variation"]): told(r) for r in rows_of(agent, pool, jobs)}
    for job in jobs[1::2]:
        (alone,) = rows_of(agent, pool, [job])
        assert told(alone) == crowd[job]


@pytest.mark.slow
def test_the_random_agent_draws_the_same_alone_and_in_a_batch(pool):
    jobs = [("find-animal", 0), ("find-animal", 1), ("lifespan-longest-lived", 0)]
    crowd = {
        (r["task"], r["variation"]): told(r)
        for r in rows_of(make_agent("random", seed=1), pool, jobs, max_actions=3)
    }
    for job in jobs[1:]:
        (alone,) = rows_of(make_agent("random", seed=1), pool, [job], max_actions=3)
        assert told(alone) == crowd[job]
    (other,) = rows_of(make_agent("random", seed=2), pool, jobs[:1], max_actions=3)
    assert told(other) != crowd[jobs[0]]


@pytest.mark.slow
def test_an_episode_whose_simulator_is_killed_is_played_again(one_each):
    t = one_each["find-animal"]
    job = (t["task"], t["variation"])
    actions = [s["action"] for s in t["steps"]]

    with Pool(1, memory_mb=256) as pool:

        def kill(slot: int) -> None:
            worker = psutil.Process(pool.processes[slot].pid)
            os.kill(workers.javas(worker.children())[0].pid, signal.SIGKILL)

        def kill_worker(slot: int) -> None:
            os.kill(pool.processes[slot].pid, signal.SIGKILL)

        full = {"max_moves": 100, "max_actions": 200}
        (calm,) = rows_of(Script(actions), pool, [job], **full)
        (hit,) = rows_of(Script(actions, {2: kill}), pool, [job], **full)
        (twice,) = rows_of(Script(actions, {1: kill_worker, 3: kill}), pool, [job], **full)
    assert (calm["restarts"], hit["restarts"], twice["restarts"]) == (0, 1, 2)
    assert calm["score"] == 100
    assert calm["steps"] == hit["steps"] == twice["steps"]


def test_every_reason_to_stop_has_its_row(pool, one_each):
    t = one_each["find-animal"]
    job, actions = (t["task"], t["variation"]), [s["action"] for s in t["steps"]]

    def end(script: list[str], **rules) -> tuple:
        (r,) = rows_of(Script(script), pool, [job], **{"max_moves": 100, **rules})
        return r["stop_reason"], r["success"], r["score"], r["actions"]

    assert end(actions, max_actions=200) == ("completed", True, 100, len(actions))
    reason, success, score, _ = end(["look around", "focus on picture"], max_actions=200)
    assert (reason, success, score) == ("failed", False, 0)
    assert end(["wait", "wait", "wait"], max_moves=11)[0] == "moves"
    reason, success, score, n = end(["look around"] * 9, max_actions=5)
    assert (reason, success, n) == ("actions", False, 5) and score < 100
    assert end(actions[:1])[0::3] == ("agent", 1)
    assert end([]) == ("agent", False, 0, 0)


@pytest.mark.parametrize(
    ("score", "done", "moves", "actions", "why"),
    [
        (-100, True, 1, 1, "failed"),
        (100, True, 500, 500, "completed"),
        (99, False, 101, 1, "moves"),
        (0, False, 100, 199, ""),
        (0, False, 0, 200, "actions"),
    ],
)
def test_the_rules_of_stopping(score, done, moves, actions, why):
    assert stop_reason(Protocol(), State("", "", "", score, done, moves), actions) == why


@pytest.mark.parametrize(
    ("scores", "zero", "last"),
    [([], 0, 0), ([10, 40], 40, 40), ([10, 40, -100], 0, 40), ([-100], 0, 0), ([5, 3, 3], 3, 3)],
)
def test_a_negative_score_counts_by_the_protocols_rule(scores, zero, last):
    assert final_score(Protocol(negative="zero"), scores) == zero
    assert final_score(Protocol(negative="last"), scores) == last


def test_success_is_a_score_of_100_and_nothing_else(pool, one_each):
    t = one_each["lifespan-longest-lived"]
    job, actions = (t["task"], t["variation"]), [s["action"] for s in t["steps"]]
    (near,) = rows_of(Script(actions[:-1]), pool, [job], max_moves=100)
    assert 0 < near["score"] < 100 and not near["success"]


@pytest.mark.parametrize(("negative", "score"), [("zero", 0), ("last", 17)])
def test_a_fatal_mistake_counts_by_the_protocols_rule_in_play(pool, one_each, negative, score):
    t = one_each["find-animal"]
    job, actions = (t["task"], t["variation"]), [s["action"] for s in t["steps"]][:2]
    wrong = [*actions, "open door to hallway", "go to hallway", "focus on picture"]
    (row,) = rows_of(Script(wrong), pool, [job], max_moves=100, negative=negative)
    assert (row["score"], row["score_raw"], row["stop_reason"]) == (score, -100, "failed")
    assert row["score_last_nonneg"] == row["score_max"] == 17 and not row["success"]


def test_the_fallback_helps_after_a_refusal_and_never_before(pool):
    script = ["look around", "opne the door to kitchen now", "look around"]
    agent = Script(script)
    (row,) = rows_of(agent, pool, [("find-animal", 0)], action_aid="after-refusal")
    aided = [k for k, s in enumerate(row["steps"]) if "aided" in s]
    assert aided == [2] and row["steps"][2]["aided"] == script[1]
    assert refused(row["steps"][1]["observation"]) and row["steps"][1]["action"] == script[1]
    assert not refused(row["steps"][2]["observation"])
    assert agent.forcings == [row["steps"][2]["action"]]
    (bare,) = rows_of(Script(script), pool, [("find-animal", 0)], action_aid="none")
    assert [s["action"] for s in bare["steps"]] == script
    assert not any("aided" in s for s in bare["steps"])


def test_the_fallback_takes_the_nearest_action():
    valid = ["open door to hall", "open door to kitchen", "wait"]
    assert nearest_action("OPEN door kitchen", valid) == "open door to kitchen"
    assert nearest_action("open door", valid) == "open door to hall"
    assert nearest_action("x", []) is None


@pytest.mark.slow
def test_the_oracle_solves_what_it_recorded_and_leaves_a_full_record(
    tmp_path, small, oracle_folder
):
    out = tmp_path / "oracle.jsonl.gz"
    rules = protocol(split="train", per_task=1)
    args = (out, "oracle", rules)
    play(*args, oracle=small["train"], tasks=workers.FAST, width=3, facts={"profile": "x"})
    rows = read_jsonl(out)
    assert [r["score"] for r in rows] == [100] * 3 and all(r["success"] for r in rows)
    run = sidecar(out)["facts"]["run"]
    assert run["protocol"]["sha"] == rows[0]["protocol"] == rules.sha
    assert (run["agent"], run["params"], run["profile"]) == ("oracle", 0, "x")
    before = out.stat().st_mtime_ns
    play(*args, oracle=small["train"], tasks=workers.FAST, width=3)
    assert out.stat().st_mtime_ns == before


def test_rows_begun_with_another_student_are_not_kept(tmp_path, students, monkeypatch):
    "A student trained again under the same name plays all its episodes itself."
    student = tmp_path / "flat"
    shutil.copytree(students["flat"], student)
    out, begun = tmp_path / "rows.jsonl.gz", []
    rules = protocol(**{**RULES, "max_actions": 2})

    class OneRow(Rollout):
        def run_all(self, jobs):
            begun.append(len(jobs))
            for row in super().run_all(jobs[:1]):
                yield row
            raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "Rollout", OneRow)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            play(out, "flat", rules, [student], tasks=workers.FAST[:1], width=1)
    shutil.copy(students["executor"] / "model.safetensors", student)
    with pytest.warns(UserWarning, match="begun with other parameters"):
        with pytest.raises(KeyboardInterrupt):
            play(out, "flat", rules, [student], tasks=workers.FAST[:1], width=1)
    assert begun == [2, 1, 2]


def test_what_cannot_play_is_refused(students):
    with pytest.raises(ValueError, match="expected an agent of .*got 'gpt'"):
        make_agent("gpt")
    with pytest.raises(ValueError, match="students of a flat agent, got those of a hierarchical"):
        make_agent("flat", [students["hierarchical"]])


def test_oracle_paths_are_known_by_task_and_variation(one_each):
    agent = OracleAgent(list(one_each.values()))
    t = one_each["boil"]
    assert agent.paths["boil", t["variation"]] == [s["action"] for s in t["steps"]]
