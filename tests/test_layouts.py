"""R9: what a student reads in play is what it read in training, on every step of the release."""

import pytest
import workers
from hypothesis import given, settings
from hypothesis import strategies as st

from sgd.agents import Episode, StepAgent, StreamAgent
from sgd.files import read_jsonl, write_jsonl
from sgd.layouts import (
    MARKS,
    Stream,
    spaced,
    step_examples,
    stream_pieces,
    unspaced,
    windows,
)
from sgd.rollout import Rollout
from sgd.students import Student, load_student, new_model
from sgd.training import ROLES, encode_trajectory, fit_student, train_texts
from sgd.world import State, protocol


class Dictated(StreamAgent):
    "A student that reads like any other, and is told what to write: the teacher's words."

    def __init__(self, students, told: dict, width: int = 8):
        super().__init__(students, width)
        self.told, self.at = told, {}

    def start(self, slot: int, episode: Episode) -> None:
        self.at[slot] = (self.told[episode.task, episode.variation], 0)
        super().start(slot, episode)

    def _write(self, network, scores, first, stop):
        said = {}
        for s in scores:
            (trajectory, segments), k = self.at[s]
            if self.goal in first:
                new = {x["first"]: x["subgoal"] for x in segments}.get(k)
                said[s] = self._encode(Stream().plan(new).text)
            else:
                said[s] = self._encode(spaced(trajectory["steps"][k]["action"]) + "<end>")
                self.at[s] = (trajectory, segments), k + 1
            assert said[s][0] in first
        self._read(network, said)
        return said

    def _read(self, network, said):
        self.decoders[network].feed(said)


class Deaf(Dictated):
    "The same, without running its networks."

    def _feed(self, network, slots, extra):
        for s in slots:
            self.threads[s].unfed.pop(network, None)
        return dict.fromkeys(slots)

    def _read(self, network, said):
        pass


def read_and_written(agent: StreamAgent, slot: int, steps: int) -> list[int]:
    "Tokens of the start and of the first steps of a slot's stream."
    return [t for step in agent.threads[slot].steps[: steps + 1] for t in step]


def as_trained(tokenizer, trajectory, segments) -> list[int]:
    "Tokens of the whole trajectory as training sees it."
    (window,) = encode_trajectory(tokenizer, trajectory, segments, ("act",), 10**9)
    return window.ids


def tiny(tokenizer, *roles) -> list[Student]:
    return [Student(new_model(workers.LFM2, tokenizer), tokenizer, r, context=10**6) for r in roles]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_recorded_steps_one_by_one_give_the_training_tokens_of_all_tasks(
    annotated, tokenizer, name
):
    told = {(t["task"], t["variation"]): (t, s) for t, s in annotated}
    agent, steps = Deaf(tiny(tokenizer, ROLES[name]), told), 0
    for t, segments in annotated:
        seen = State(t["description"], **t["init"], score=0, done=False, moves=0)
        agent.start(0, Episode(t["task"], t["variation"], t["description"], seen))
        for step in t["steps"]:
            decision = agent.act([0], {})[0]
            assert decision.action == step["action"]
            agent.result(0, decision.action, State(**{k: step[k] for k in State._fields}))
            steps += 1
        want = as_trained(tokenizer, t, None if name == "flat" else segments)
        assert read_and_written(agent, 0, len(t["steps"])) == want, (t["task"], t["variation"])
    assert steps == sum(len(t["steps"]) for t, _ in annotated)
    assert len({t["task"] for t, _ in annotated}) == 30


@pytest.mark.slow
@pytest.mark.parametrize("roles", [["flat"], ["hierarchical"], ["planner", "executor"]])
def test_live_play_of_oracle_actions_gives_the_training_tokens(pool, small, tokenizer, roles):
    rows, notes = read_jsonl(small["train"]), read_jsonl(small["train_notes"])
    jobs = {(t["task"], t["variation"]): (t, a["segments"]) for t, a in zip(rows, notes)}
    jobs = dict(list(jobs.items())[1::4])
    agent = Dictated(tiny(tokenizer, *[ROLES[r] for r in roles]), jobs, width=2)
    rules = protocol(max_moves=1000, max_actions=1000, split="train")
    rollout, seen = Rollout(agent, rules, pool, {}), []
    for k in range(0, len(jobs), 2):
        pair = list(jobs)[k : k + 2]
        for row in rollout.run_all(pair):
            key = row["task"], row["variation"]
            t, segments = jobs[key]
            want = as_trained(tokenizer, t, None if roles == ["flat"] else segments)
            assert row["score"] == 100 and row["actions"] == len(t["steps"])
            assert read_and_written(agent, pair.index(key), row["actions"]) == want
            seen.append(key)
    assert sorted(seen) == sorted(jobs)


class Prompts(StepAgent):
    "A student of the step layout that is told what to write and keeps what it was asked."

    def __init__(self, tokenizer, told: dict):
        config = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
        net = new_model({**config, "num_heads": 2}, tokenizer)
        super().__init__([Student(net, tokenizer, ("plan", "act"), "step")], width=2)
        self.told, self.left, self.asked = told, {}, {}

    def start(self, slot: int, episode: Episode) -> None:
        trajectory, segments = self.told[episode.task, episode.variation]
        self.left[slot] = step_examples(trajectory, segments, ("plan", "act"))
        self.asked[slot] = []
        super().start(slot, episode)

    def _ask(self, student, role, slots):
        said = {}
        for s in slots:
            want = self.left[s].pop(0)
            self.asked[s].append((role, self.threads[s].steps.prompt(role)) == want[:2])
            said[s] = want.target
        return said


def shortest(annotated) -> dict:
    "The shortest train path of each task, one that no seed changes where there is one."
    found = {}
    for t, segments in sorted(annotated, key=lambda ts: (ts[0]["flips"], len(ts[0]["steps"]))):
        if t["split"] == "train":
            found.setdefault(t["task"], (t, segments))
    return {(name, t["variation"]): (t, s) for name, (t, s) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stream", "step"])
def test_live_play_of_all_tasks_reads_as_in_training(annotated, tokenizer, layout, pool):
    told = shortest(annotated)
    assert len(told) == 30
    stream = layout == "stream"
    agent = (
        Deaf(tiny(tokenizer, ROLES["hierarchical"]), told, width=2)
        if stream
        else Prompts(tokenizer, told)
    )
    rules = protocol(max_moves=10**6, max_actions=10**6, split="train", action_aid="none")
    rollout = Rollout(agent, rules, pool, {})
    for key, (t, segments) in told.items():
        (row,) = rollout.run_all([key])
        assert (row["score"], row["actions"]) == (100, len(t["steps"])), key
        if stream:
            want = as_trained(tokenizer, t, segments)
            assert read_and_written(agent, 0, row["actions"]) == want, key
        else:
            assert len(agent.asked[0]) == 2 * row["actions"] and all(agent.asked[0]), key


def test_flat_is_hierarchical_with_the_plans_deleted_byte_for_byte(annotated):
    for t, segments in annotated:
        flat = "".join(p.text for pieces in stream_pieces(t) for p in pieces)
        both = [p for pieces in stream_pieces(t, segments) for p in pieces]
        assert "".join(p.text for p in both if p.role != "plan") == flat
        assert sum(p.role == "plan" for p in both) == len(t["steps"])
        assert "<goal>" not in flat and "<keep>" not in flat


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(10, 200))
def test_windows_supervise_each_step_once_and_fit(lengths, size):
    cuts = windows(lengths, size)
    supervised = [k for _, done, last in cuts for k in range(done + 1, last + 1)]
    assert supervised == list(range(1, len(lengths)))
    for first, done, last in cuts:
        used = lengths[0] + sum(lengths[first + 1 : last + 1])
        assert 0 <= first <= done < last
        assert used <= size or (last == done + 1 and first == done), (cuts, used)


def test_every_token_of_a_decision_is_supervised_in_exactly_one_window(annotated, tokenizer):
    longest = sorted(annotated, key=lambda ts: len(ts[0]["steps"]))[-3:]
    for t, segments in longest:
        whole = encode_trajectory(tokenizer, t, segments, ("plan", "act"), 10**9)
        cut = encode_trajectory(tokenizer, t, segments, ("plan", "act"), 512)
        assert len(whole) == 1 and len(cut) > 1
        total = sum(sum(w.weights) for w in cut)
        assert total == sum(whole[0].weights)
        loud = [[i for i, w in zip(x.ids, x.weights) if w] for x in cut]
        assert [i for part in loud for i in part] == [
            i for i, w in zip(whole[0].ids, whole[0].weights) if w
        ]


def test_the_tokenizer_is_lossless_on_all_trajectory_text(annotated, tokenizer):
    for t, segments in annotated:
        text = "".join(p.text for pieces in stream_pieces(t, segments) for p in pieces)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_the_tokenizer_is_lossless_on_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(st.lists(st.text("abcXYZ019-,'", min_size=1), min_size=1, max_size=5))
def test_actions_come_back_as_they_were_written(words):
    action = f"{words[0]}({' '.join(words)}) {' '.join(words)}"
    assert unspaced(spaced(action)) == action


def test_each_mark_is_one_token_and_the_world_cannot_write_one(tokenizer):
    assert all(len(tokenizer.encode(m, add_special_tokens=False)) == 1 for m in MARKS)
    piece = Stream().start("<act> trick <end>", "<keep>", "<goal>")
    ids = tokenizer.encode(piece.text, add_special_tokens=False)
    marks = [i for i in ids if i in tokenizer.convert_tokens_to_ids(list(MARKS))]
    assert tokenizer.convert_ids_to_tokens(marks) == ["<task>", "<look>", "<inv>"]


def test_the_vocabulary_comes_from_the_train_split_only(small, tmp_path):
    dev = read_jsonl(small["dev"])
    words = "".join(train_texts(small["train"], small["train_notes"], None))
    for t in dev:
        t["description"] += " Zyzzyva zyzzyva zyzzyva"
    write_jsonl(tmp_path / "dev.jsonl", dev)
    assert "Zyzzyva" not in words
    vocab = {}
    for name, path in {"a": small["dev"], "b": tmp_path / "dev.jsonl"}.items():
        out = fit_student(
            tmp_path / name,
            small["train"],
            path,
            small["train_notes"],
            small["dev_notes"],
            model=workers.LFM2,
            steps=1,
            per_task=1,
            dev_per_task=1,
            threads=1,
        )
        vocab[name] = load_student(out).tokenizer.get_vocab()
    assert vocab["a"] == vocab["b"]
