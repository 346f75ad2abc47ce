"""R9 for the step layout, and an encoder-decoder student from its first weight to play."""

import json
import re

import pytest
import torch
import workers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sgd import agents, training
from sgd.agents import Episode, StepAgent
from sgd.files import read_json, read_jsonl
from sgd.layouts import QUESTIONS, Steps, room_name, step_examples, step_marks
from sgd.rollout import make_agent
from sgd.students import Student, encode_text, load_student, new_model, train_tokenizer
from sgd.training import encode_steps, fit_student
from sgd.world import State

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
BOTH = ("plan", "act")
SEEN = ("observation", "look", "inventory", "score")


def holding(segments: list[dict], n: int) -> list[str]:
    "The sub-goal that holds at each of n steps."
    return [next(s["subgoal"] for s in segments if s["first"] <= k <= s["last"]) for k in range(n)]


def by_hand(trajectory: dict, segments: list[dict] | None) -> list[tuple]:
    "Prompts and answers, the builder fed event by event as in play."
    s, out = Steps(subgoals=segments is not None), []
    s.start(trajectory["description"], **trajectory["init"])
    goals = holding(segments, len(trajectory["steps"])) if segments else []
    for k, step in enumerate(trajectory["steps"]):
        if segments:
            out.append(("plan", s.prompt("plan"), goals[k]))
            s.plan(goals[k])
        out.append(("act", s.prompt("act"), step["action"]))
        s.act(step["action"])
        s.result(*(step[k] for k in SEEN))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("flat", [True, False])
def test_recorded_steps_one_by_one_give_the_training_prompts_of_all_tasks(annotated, flat):
    decisions = 0
    for t, segments in annotated:
        cuts = None if flat else segments
        made = [tuple(e)[:3] for e in step_examples(t, cuts, BOTH)]
        assert made == by_hand(t, cuts), (t["task"], t["variation"])
        decisions += len(made)
    steps = sum(len(t["steps"]) for t, _ in annotated)
    assert decisions == steps * (1 if flat else 2)
    assert len({t["task"] for t, _ in annotated}) == 30


@pytest.fixture(scope="module")
def words(one_each):
    "A tokenizer of prompts."
    marks = ("<end>", *step_marks(10))
    texts = [e.prompt for t in one_each.values() for e in step_examples(t, None, ("act",))[::9]]
    return train_tokenizer(texts, 1500, marks)


def students(tokenizer, *roles, context=4096) -> list[Student]:
    return [Student(new_model(T5, tokenizer).eval(), tokenizer, r, "step", context) for r in roles]


def bare(trajectory, segments, length) -> int:
    "The length of the longest prompt of a trajectory without its history."
    return max(length(e.prompt) for e in step_examples(trajectory, segments, BOTH, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "roles, tight",
    [([("act",)], False), ([BOTH], False), ([BOTH], True), ([("plan",), ("act",)], False)],
)
def test_the_agent_in_play_asks_the_training_prompts(annotated, words, roles, tight, monkeypatch):
    chosen, told, shortened = {t["task"]: (t, s) for t, s in annotated}, {}, 0
    chosen = list(chosen.values())[:: 6 if tight else 2]
    monkeypatch.setattr(agents, "answer", lambda model, ids, *_: {s: told[s].pop(0) for s in ids})
    agent = StepAgent(students(words, *roles))

    def length(text):
        return len(encode_text(words, text))

    for t, segments in chosen:
        t = {**t, "steps": t["steps"][:25]}
        cuts = segments if len(sum(roles, ())) == 2 else None
        size = bare(t, cuts, length) if tight else 4096
        for s in agent.students:
            s.context = size
        want = step_examples(t, cuts, BOTH, 10, lambda text: length(text) <= size)
        told[3] = [encode_text(words, e.target) for e in want]
        first = State(t["description"], **t["init"], score=0, done=False, moves=0)
        agent.start(3, Episode(t["task"], t["variation"], t["description"], first))
        left = list(want)
        for step in t["steps"]:
            assert agent.act([3], {})[3].action == step["action"]
            for role in ("plan", "act") if cuts else ("act",):
                asked = left.pop(0)
                assert (asked.role, asked.prompt) == (role, agent.threads[3].prompts[role])
            agent.result(3, step["action"], State(**{k: step[k] for k in State._fields}))
        counted = agent.counts(3)
        lost = sum(e.dropped > 0 for e in want)
        assert counted["shortened_prompts"] == lost and counted["unreadable_plans"] == 0
        shortened += lost
    assert (shortened > 0) == tight


def test_flat_prompts_are_the_executors_without_the_subgoals(annotated):
    for t, segments in annotated[:: max(1, len(annotated) // 60)]:
        led = [e.prompt.split(" </s> ") for e in step_examples(t, segments, ("act",))]
        flat = [e.prompt.split(" </s> ") for e in step_examples(t, None, ("act",))]
        assert [p[:2] + p[3:] for p in led] == flat
        assert all(p[-1] == QUESTIONS["act"] and "subtask" not in " ".join(p) for p in flat)


def test_what_is_left_out_is_the_oldest_and_only_what_must_go(one_each):
    t = max(one_each.values(), key=lambda t: len(t["steps"]))
    cuts = [{"subgoal": f"go({k})", "first": k, "last": k} for k in range(len(t["steps"]))]
    whole, limit = step_examples(t, cuts, BOTH), bare(t, None, len) + 100
    shorter = step_examples(t, cuts, BOTH, 10, lambda text: len(text) <= limit)
    assert max(e.dropped for e in shorter) > 10
    for e, short in zip(whole, shorter):
        assert len(short.prompt) <= limit and (short.dropped == 0) == (len(e.prompt) <= limit)
        a, b = (re.sub(r" <extra_id_\d+>", "", x.prompt).split(" </s> ") for x in (e, short))
        assert a[:2] + a[4:] == b[:2] + b[4:]
        kept = b[3].split(" --> ")[1:]
        assert kept == a[3].split(" --> ")[1:][-len(kept) :] or not kept
    with pytest.raises(ValueError, match="no history left, try a larger context"):
        step_examples(t, cuts, BOTH, 10, lambda text: len(text) <= 100)


def test_a_room_is_what_its_first_line_says():
    looks = {
        "This room is called the art studio. In it, you see: \n\ta table": "art studio",
        "This outside location is called the outside. Here you see: ": "outside",
        "A cave, dark\nThis room is called the hall.": "A cave, dark",
    }
    assert [room_name(k) for k in looks] == list(looks.values())


def fit(out, small, **more):
    "A T5 of a few thousand parameters, trained for a moment."
    config = {"layout": "step", "model": T5, "batch": 8, "context": 1024, "vocab": 800}
    config |= {"steps": 40, "every": 20, "per_task": 2, "dev_per_task": 1, "max_moves": 8}
    config |= {
        "roles": "hierarchical",
        "save_seconds": 0,
        "threads": 1,
        "lr": 1e-2,
        "muon_lr": 1e-2,
    }
    paths = [small[k] for k in ("train", "dev", "train_notes", "dev_notes")]
    return fit_student(out, *paths, **{**config, **more})


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    "A trained T5 and its losses."
    kept, losses = training._finish, []

    def finish(run, *rest):
        losses.extend(run.state["losses"])
        return kept(run, *rest)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "_finish", finish)
        return fit(tmp_path_factory.mktemp("t5") / "hierarchical", small), losses


def test_a_tiny_t5_learns_and_loads_without_us(trained, small):
    folder, losses = trained
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    record = read_json(folder / "training.json")
    assert record["layout"] == "step" and record["curve"][-1]["dev_loss"] < losses[0]
    model, tok = (
        AutoModelForSeq2SeqLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ours = load_student(folder)
    assert (ours.layout, ours.roles, ours.history, ours.context) == ("step", BOTH, 10, 1024)
    ids = torch.tensor([encode_text(tok, "What action should you do next?")])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        a, b = (
            m.eval()(input_ids=ids, decoder_input_ids=start).logits for m in (model, ours.model)
        )
    assert torch.equal(a, b)


def test_a_checkpoint_is_a_start(trained, small, tmp_path):
    folder, losses = trained
    out = fit(tmp_path / "on", small, model=None, checkpoint=str(folder), steps=2, every=1, micro=3)
    assert read_json(out / "training.json")["curve"][0]["train_loss"] < 0.8 * losses[0]
    assert load_student(out).tokenizer.get_vocab() == load_student(folder).tokenizer.get_vocab()


def test_stopped_and_resumed_gives_the_same_losses_in_spite_of_dropout(
    small, tmp_path, monkeypatch
):
    kept, seen = training._finish, []

    def finish(run, *rest):
        seen.append(json.dumps(run.state["losses"]))
        return kept(run, *rest)

    real = training._update

    def dies(run, *rest):
        if run.state["step"] == 5:
            raise KeyboardInterrupt
        return real(run, *rest)

    monkeypatch.setattr(training, "_finish", finish)
    fit(tmp_path / "whole", small, steps=8, every=2)
    monkeypatch.setattr(training, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", small, steps=8, every=2)
    monkeypatch.setattr(training, "_update", real)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        fit(tmp_path / "cut", small, steps=8, every=2)
    assert seen[0] == seen[1]
    assert load_student(tmp_path / "whole").model.config.dropout_rate > 0


def test_alone_as_in_company(trained, small):
    agent = make_agent("hierarchical", [trained[0]], width=4)
    assert isinstance(agent, StepAgent) and agent.params > 0
    rows = read_jsonl(small["train"])[::5]

    def play(slots):
        said = {s: [] for s in slots}
        for s in slots:
            t = rows[s % len(rows)]
            first = State(t["description"], **t["init"], score=0, done=False, moves=0)
            agent.start(s, Episode(t["task"], t["variation"], t["description"], first))
        for k in range(4):
            for s, d in agent.act(slots, {}).items():
                said[s].append(d)
                step = rows[s % len(rows)]["steps"][k % 2]
                agent.result(s, d.action, State(**{f: step[f] for f in State._fields}))
        return {s: (said[s], agent.counts(s)) for s in slots}

    together = play([0, 1, 2])
    assert [play([s])[s] for s in (0, 1, 2)] == list(together.values())
    assert all(c["tokens_in"] > 0 and c["tokens_out"] > 0 for _, c in together.values())


def test_wrong_students_are_refused_and_a_prompt_that_cannot_fit_ends_the_episode(words, small):
    tiny = students(words, BOTH, context=20)
    agent = StepAgent(tiny)
    agent.start(0, Episode("t", 0, "Do it.", State("Do it.", "a room\n" * 30, "", 0, False, 0)))
    assert agent.act([0], {})[0].action is None
    with pytest.raises(ValueError, match="expected students of the step layout"):
        StepAgent([Student(tiny[0].model, words)])
    with pytest.raises(ValueError, match="one executor and at most one planner"):
        StepAgent(students(words, ("act",), ("act",)))
    with pytest.raises(ValueError, match="expected an encoder-decoder for the step layout"):
        training.start_model(
            {"layout": "step", "checkpoint": None, "history": 3, "vocab": 400, "seed": 0}
            | {"model": workers.LFM2},
            iter(["a word"] * 3),
        )


def test_an_encoded_trajectory_says_how_many_prompts_were_shortened(words, one_each):
    t = max(one_each.values(), key=lambda t: len(t["steps"]))
    whole, none = encode_steps(words, t, None, ("act",), 10_000)
    size = bare(t, None, lambda text: len(encode_text(words, text)))
    short, some = encode_steps(words, t, None, ("act",), size)
    assert none == 0 < some and len(short) == len(whole) == len(t["steps"])
    assert max(len(q.ids) for q in short) <= size
