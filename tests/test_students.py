"""Decoding many rows at once changes nothing: neither the scores nor who sits beside whom."""

import pytest
import torch
import workers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgd.agents import Episode, StreamAgent
from sgd.students import Decoder, Student, load_student, n_params, new_model
from sgd.world import State

CONFIGS = {"lfm2": workers.LFM2, "llama": workers.LLAMA}
T5 = {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tokenizer):
    "One layer stack of each family, in evaluation mode."
    return new_model(CONFIGS[request.param], tokenizer, seed=1).eval()


def tokens(model, n: int, seed: int) -> list[int]:
    "Random token ids."
    g = torch.Generator().manual_seed(seed)
    return torch.randint(10, model.config.vocab_size, (n,), generator=g).tolist()


def fed(model, rows: int, events: list[dict[int, list[int]]], watch: int) -> list[torch.Tensor]:
    "Scores of one row after each of its feeds."
    decoder, out = Decoder(model, rows), []
    for event in events:
        scores = decoder.feed(event)
        if watch in event:
            out.append(scores[watch])
    return out


@torch.inference_mode()
def test_ragged_rows_agree_with_a_plain_forward_pass(model):
    decoder, said = Decoder(model, 4), {r: [] for r in range(4)}
    for k, sizes in enumerate([(5, 40, 0, 90), (1, 1, 7, 0), (1, 1, 1, 1), (33, 2, 64, 1)]):
        event = {r: tokens(model, n, 10 * k + r) for r, n in enumerate(sizes) if n}
        scores = decoder.feed(event)
        assert set(scores) == set(event)
        for r, new in event.items():
            said[r] += new
            plain = model(torch.tensor([said[r]])).logits[0, -1]
            assert torch.allclose(scores[r], plain, atol=2e-5), (k, r)
            assert decoder.length(r) == len(said[r])
    decoder.reset(2)
    new = tokens(model, 12, 99)
    plain = model(torch.tensor([new])).logits[0, -1]
    assert torch.allclose(decoder.feed({2: new})[2], plain, atol=2e-5)


@pytest.mark.parametrize("start", [10, 490, 1000])
def test_a_row_alone_equals_the_row_in_a_crowd_bit_for_bit(model, start):
    mine = [tokens(model, n, k) for k, n in enumerate([start, 1, 1, 33, 20, 1, 64, 2])]
    alone = [{3: t} for t in mine]
    crowd = []
    for k, t in enumerate(mine):
        others = {r: tokens(model, 1 + (17 * k * r) % 70, 50 * k + r) for r in range(8) if r != 3}
        crowd.append({**others, 3: t})
        if k % 2:
            crowd.append(others)
    crowd[0][5] = tokens(model, 1100, 7)
    for a, b in zip(fed(model, 8, alone, 3), fed(model, 8, crowd, 3), strict=True):
        assert torch.equal(a, b)


def test_a_row_is_not_disturbed_by_the_rows_that_were_reset(model):
    decoder, mine = Decoder(model, 2), [tokens(model, n, n) for n in (30, 5, 9)]
    decoder.feed({1: tokens(model, 700, 3), 0: mine[0]})
    decoder.reset(1)
    decoder.feed({1: tokens(model, 3, 4)})
    got = [decoder.feed({0: t})[0] for t in mine[1:]]
    assert all(map(torch.equal, got, fed(model, 2, [{0: t} for t in mine], 0)[1:]))


def test_answers_are_greedy_cut_where_too_long_and_counted(model):
    decoder, new = Decoder(model, 2), tokens(model, 9, 0)
    scores = decoder.feed({0: new})
    allowed = [20, 21, 22]
    said, after = decoder.write(scores, allowed, {4}, max_new=6, end=4)
    assert said[0][0] == allowed[int(scores[0][allowed].argmax())]
    assert said[0][-1] == 4 and len(said[0]) <= 7
    again, text = Decoder(model, 2), new + said[0][:1]
    for token in said[0][1:-1]:
        assert int(again.feed({1: text})[1].argmax()) == token
        text = [token]
    assert decoder.length(0) == decoder.fed == len(new) + len(said[0])
    again.feed({1: text})
    assert torch.allclose(after[0], again.feed({1: said[0][-1:]})[1], atol=2e-5)


def test_a_saved_student_is_a_plain_checkpoint(model, tokenizer, tmp_path):
    student = Student(model, tokenizer, ("plan", "act"), context=777, facts={"seed": 1})
    folder = student.save(tmp_path / "s")
    ids = torch.tensor([tokens(model, 40, 0)])
    with torch.inference_mode():
        want = model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(plain(ids).logits, want)
        mine = load_student(folder)
        assert torch.equal(mine.model(ids).logits, want)
    assert (mine.roles, mine.context, mine.facts) == (("plan", "act"), 777, {"seed": 1})
    text = "<task> Boil water.\nThen stop<end>"
    assert AutoTokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)
    assert n_params(mine.model) == n_params(model)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (new_model(workers.LFM2, tokenizer, seed=3).state_dict() for _ in range(2))
    other = new_model(workers.LFM2, tokenizer, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], other[k]) for k in a)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_work_is_refused(tokenizer, tmp_path):
    t5 = new_model(T5, tokenizer)
    with pytest.raises(TypeError, match="expected a causal model, got an encoder-decoder, try"):
        Decoder(t5)
    with pytest.raises(TypeError, match="encoder-decoder"):
        StreamAgent([Student(t5, tokenizer)])
    with pytest.raises(FileNotFoundError, match="no student.json, try `sgd run 30_train`"):
        load_student(tmp_path)
    lm = new_model(workers.LFM2, tokenizer)
    with pytest.raises(ValueError, match="expected one executor and at most one planner"):
        StreamAgent([Student(lm, tokenizer, ("plan",))])
    with pytest.raises(ValueError, match="stream layout"):
        StreamAgent([Student(lm, tokenizer, layout="step")])


@pytest.mark.parametrize(
    ("plan", "subgoal", "unreadable"),
    [
        ("<goal> navigate_to( kitchen)<end>", "navigate_to(kitchen)", 0),
        ("<goal> heat( water, stove ( hot))<end>", "heat(water, stove (hot))", 0),
        ("<goal> kitchen<end>", "before(x)", 1),
        ("<goal><end>", "before(x)", 1),
        ("<goal> f( a<end>", "before(x)", 1),
        ("<keep>", "before(x)", 0),
    ],
)
def test_a_plan_that_names_no_subgoal_means_keep_and_is_counted(
    students, plan, subgoal, unreadable
):
    agent = StreamAgent([load_student(students["hierarchical"])], width=1)
    agent.start(0, Episode("boil", 0, "Boil", State("Boil", "a room", "nothing", 0, False, 0)))
    agent.threads[0].subgoal = "before(x)"
    agent._adopt(0, agent._encode(plan))
    assert agent.threads[0].subgoal == subgoal
    assert agent.counts(0)["unreadable_plans"] == unreadable
