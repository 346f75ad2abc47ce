"""Bar R12: intervals cover what they promise, and the same seed gives the same interval."""

import numpy as np
import pytest

from sgd.files import root
from sgd.stats import (
    CLASSES,
    Draws,
    Scores,
    class_means,
    compare,
    contrast,
    draw,
    draw_pair,
    gather,
    interval,
    length_classes,
    pairs,
    replicate,
    solved_tasks,
    summary,
    task_means,
)

REPORTED = root() / "paper_results" / "reported"
# Numbers of test variations of the 30 tasks, at most ten a task: 271 episodes.
WIDTHS = [9] * 4 + [10] * 3 + [5, 5] + [10] * 8 + [8, 9, 9] + [10] * 3 + [5, 4] + [10] * 5
BELLS = {"seed": 0.5, "seed_task": 5.0, "variation": 20.0, "rest": 25.0}


@pytest.fixture(scope="module")
def classes():
    return length_classes(REPORTED)


def empty(classes, seeds):
    cells = {task: np.zeros((seeds, n)) for task, n in zip(classes, WIDTHS, strict=True)}
    variations = {task: tuple(range(x.shape[1])) for task, x in cells.items()}
    return Scores(tuple(range(seeds)), cells, variations)


def simulate(like, rng, seed=0.0, seed_task=0.0, variation=0.0, rest=0.0):
    "Scores whose true mean is 0 on every task, with four sources of chance."
    seeds = len(like.seeds)
    everywhere = rng.normal(0, seed, (seeds, 1))
    return like._replace(
        values={
            task: everywhere
            + rng.normal(0, seed_task, (seeds, 1))
            + rng.normal(0, variation, x.shape[1])
            + rng.normal(0, rest, x.shape)
            for task, x in like.values.items()
        }
    )


def coverage(like, draws, trials, of=lambda scores: scores, **bells):
    hits = 0
    for trial in range(trials):
        drawn = replicate(of(simulate(like, np.random.default_rng(trial), **bells)), draws)
        low, high = interval(drawn.mean(axis=1))
        hits += low <= 0 <= high
    return hits / trials


def test_widths_are_the_benchmark(classes):
    assert len(WIDTHS) == len(classes) == 30 and sum(WIDTHS) == 271
    assert [list(classes.values()).count(c) for c in CLASSES[:3]] == [10, 8, 12]


def test_classes_agree_with_the_world(classes):
    world = pytest.importorskip("sgd.world")
    assert {t.id: t.length for t in world.tasks()} == classes


@pytest.mark.timeout(90)
def test_three_seeds_cover(classes):
    like = empty(classes, 3)
    assert 0.93 <= coverage(like, draw(like, 1000), 1500, **BELLS) <= 0.97


@pytest.mark.timeout(90)
def test_one_seed_covers(classes):
    "One student, new variations: what the seed adds is part of the truth, so it is left out."
    like = empty(classes, 1)
    bells = {"variation": 20.0, "rest": 25.0}
    assert 0.93 <= coverage(like, draw(like, 1000), 1500, **bells) <= 0.97


@pytest.mark.timeout(90)
def test_one_seed_covers_on_the_class_with_fewest_variations(classes):
    "Four and five variations a task: without the correction the interval would be too short."
    few = empty(classes, 1)
    few = few._replace(values={t: x for t, x in few.values.items() if x.shape[1] < 6})
    wide = draw(few, 1000)
    bells = {"variation": 20.0, "rest": 25.0}
    assert 0.90 <= coverage(few, wide, 1000, **bells)


@pytest.mark.timeout(90)
def test_a_difference_covers(classes):
    "Two agents share variations, with the same draws for both; the true difference is 4."
    like, hits, trials = empty(classes, 3), 0, 1000
    draws = draw_pair(pairs(like, like), 1000)
    own = {"seed": 0.5, "seed_task": 5.0, "rest": 20.0}
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        shared = simulate(like, rng, variation=25.0)
        a, b = (simulate(like, rng, **own) for _ in range(2))
        a = a._replace(values={t: x + shared.values[t] + 4 for t, x in a.values.items()})
        b = b._replace(values={t: x + shared.values[t] for t, x in b.values.items()})
        low, high = interval(replicate(contrast(pairs(a, b)), draws).mean(axis=1))
        hits += low <= 4 <= high
    assert 0.93 <= hits / trials <= 0.98


def test_the_same_seed_gives_the_same_interval(classes):
    scores = simulate(empty(classes, 3), np.random.default_rng(1), **BELLS)
    one, two = (summary(scores, classes, replicates=500, seed=7) for _ in range(2))
    assert one.equals(two)
    assert not one.equals(summary(scores, classes, replicates=500, seed=8))


def test_global_random_state_is_neither_read_nor_moved(classes):
    scores = simulate(empty(classes, 2), np.random.default_rng(1), **BELLS)
    np.random.seed(0)
    one = summary(scores, classes, replicates=200)
    state = np.random.get_state()[1].copy()
    np.random.seed(1)
    assert one.equals(summary(scores, classes, replicates=200))
    np.random.seed(0)
    assert (np.random.get_state()[1] == state).all()


def test_seeds_are_drawn_once_for_all_tasks(classes):
    "If a seed adds 10 everywhere, a replicate moves every task by the same amount."
    like = empty(classes, 3)
    shift = np.array([[0.0], [10.0], [20.0]])
    scores = like._replace(values={t: x + shift for t, x in like.values.items()})
    drawn = replicate(scores, draw(scores, 300))
    assert np.ptp(drawn, axis=1).max() < 1e-9 < np.ptp(drawn, axis=0).min()


def test_draws_of_a_task_do_not_depend_on_the_others(classes):
    like = empty(classes, 3)
    alone = like._replace(values={"4-2": like.values["4-2"]})
    assert (draw(like, 50).variations["4-2"] == draw(alone, 50).variations["4-2"]).all()


def test_one_seed_is_widened_and_two_are_not():
    x = np.array([[0.0, 10.0, 50.0, 100.0]])
    task = {"8-2": (0, 1, 2, 3)}
    one = Scores((0,), {"8-2": x}, task)
    two = Scores((0, 1), {"8-2": np.vstack([x, x])}, task)
    spread = [replicate(s, draw(s, 50_000)).std() for s in (one, two)]
    assert spread[0] == pytest.approx(x.std(ddof=1) / 2, rel=0.02)
    assert spread[1] == pytest.approx(x.std(ddof=0) / 2, rel=0.02)


def test_one_variation_has_no_width():
    one = Scores((0,), {"8-2": np.array([[30.0]])}, {"8-2": (0,)})
    assert interval(replicate(one, draw(one, 10))[:, 0]) == (30.0, 30.0)


def test_overall_is_the_mean_over_tasks_not_over_episodes(classes):
    rows = [
        {"seed": 0, "task_id": task, "variation": v, "score": score}
        for task, score, n in (("4-2", 100, 10), ("8-2", 0, 4))
        for v in range(n)
    ]
    scores = gather(rows)
    means = class_means(task_means(scores), list(scores.values), classes)
    assert means == {"S": 50.0, "all": 50.0}


def test_solved_tasks_are_counted_per_seed(classes):
    cells = {"4-2": np.array([[1, 1], [1, 0]]), "1-1": np.array([[1, 1], [1, 1]])}
    scores = Scores((0, 1), cells, {t: (0, 1) for t in cells})
    assert solved_tasks(scores, classes) == {"S": 0.5, "L": 1.0, "all": 1.5}


@pytest.mark.parametrize("break_it", ["hole", "double"])
def test_bad_rows_are_refused(break_it):
    rows = [
        {"seed": s, "task_id": "4-2", "variation": v, "score": 1} for s in (0, 1) for v in (5, 6)
    ]
    rows = rows[:-1] if break_it == "hole" else [*rows, rows[0]]
    with pytest.raises(ValueError, match="expected .* got task 4-2 variation .* try"):
        gather(rows)


def test_a_pair_uses_common_variations_and_seeds(classes):
    cells = {"4-2": np.arange(6.0).reshape(2, 3)}
    a = Scores((0, 1), cells, {"4-2": (7, 8, 9)})
    b = Scores((1, 2), cells, {"4-2": (8, 9, 10)})
    pair = pairs(a, b)
    assert pair.a.seeds == (1,) and pair.a.variations == {"4-2": (8, 9)}
    assert pair.a.values["4-2"].tolist() == [[4, 5]] and pair.b.values["4-2"].tolist() == [[0, 1]]
    apart = pairs(a, b, by_index=False)
    assert len(apart.index) == 4
    table = compare(apart, classes, replicates=200).set_index("class")
    assert table.loc["all", "difference"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="by_index=False"):
        pairs(a, b._replace(seeds=(5, 6)))


def test_seeds_drawn_apart_have_weights_that_sum_to_one(classes):
    like = empty(classes, 3)
    draws = draw_pair(pairs(like, like, by_index=False), 100)
    assert isinstance(draws, Draws) and draws.seeds.shape == (100, 9)
    assert draws.seeds.sum(axis=1) == pytest.approx(1.0)


def test_improvement_counts_ties_half(classes):
    a = Scores((0,), {"4-2": np.array([[1.0, 2, 3, 4]])}, {"4-2": (0, 1, 2, 3)})
    b = a._replace(values={"4-2": np.array([[1.0, 1, 1, 9]])})
    assert compare(pairs(a, b), classes, replicates=50).improvement.tolist() == [0.625] * 2
