import itertools

import numpy as np
import pytest
from scipy import stats

from embedtune.data.retrieval import RetrievalSet
from embedtune.errors import UserError
from embedtune.judge import compare
from embedtune.judge.compare import (
    Difference,
    changed_most,
    mean_interval,
    paired,
    ratio_difference,
    sign_flip,
    verdict,
)
from embedtune.judge.report import Report


def report(values, model="m", name="nDCG@10", **more) -> Report:
    values = np.asarray(values, float)
    items = tuple(f"q{n}" for n in range(len(values)))
    return Report("retrieval", "d", model, 8, items, {name: float(values.mean())}, {name: values}, **more)


def similarity(gold, predicted, model="m") -> Report:
    items = tuple(map(str, range(len(gold))))
    summary = {"spearman": stats.spearmanr(gold, predicted)[0], "pearson": stats.pearsonr(gold, predicted)[0]}
    return Report("similarity", "d", model, 8, items, summary, gold=np.array(gold), predicted=np.array(predicted))


def ndcg_differences(same: float, better: float, spread: float, size: int = 200_000) -> np.ndarray:
    """Differences in nDCG@10 of queries with one relevant document: its rank has a heavy tail, and under the second
    model it is the same (with probability `same`), or better or worse by a factor."""
    draw = np.random.default_rng(0)
    before = np.minimum(np.floor(draw.pareto(0.6, size) + 1), 1e6)
    factor = np.exp(np.abs(draw.normal(0, spread, size)))
    up, down = np.ceil(before / factor), np.floor(before * factor) + (draw.random(size) < 0.5)
    after = np.where(draw.random(size) < same, before, np.where(draw.random(size) < better, up, down))
    gain = [np.where(rank <= 10, 1 / np.log2(1 + rank), 0) for rank in (before, after)]
    return gain[1] - gain[0]


POPULATIONS = {  # zeros, skew: 52 % -0.3, 66 % 0, 77 % 0.2
    "most queries move": ndcg_differences(0, 0.55, 1),
    "a good tuning": ndcg_differences(0.3, 0.8, 1.5),
    "three in four stay": ndcg_differences(0.55, 0.8, 2),
}


RARE = ndcg_differences(0.85, 0.95, 3)  # 92 % zeros, skew 3.3


def coverage(population, n: int, sets: int = 2000) -> float:
    """Share of intervals that hold the mean of the population, in percent."""
    draw, truth, held = np.random.default_rng(n), population.mean(), 0
    for seed in range(sets):
        low, high = mean_interval(draw.choice(population, n), np.ones(n), seed=seed, draws=500)
        held += low <= truth <= high
    return 100 * held / sets


@pytest.mark.parametrize("population", POPULATIONS.values(), ids=POPULATIONS)
@pytest.mark.parametrize("n", [50, 100, 300])
def test_intervals_hold_the_truth_95_times_of_100(population, n):
    assert 93 <= coverage(population, n) <= 97


def test_intervals_hold_the_truth_where_hardly_anything_changes():
    """A plain percentile interval holds it 89 times of 100 here: 50 queries of which four changed."""
    assert np.mean(RARE == 0) > 0.9
    assert 92 <= coverage(RARE, 50) <= 97


def clusters(draw, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean zero in groups of 1 to 8 that share most of theirs, and the group of each."""
    sizes = draw.integers(1, 9, groups)
    place = np.repeat(np.arange(groups), sizes)
    return draw.standard_normal(groups)[place] + 0.5 * draw.standard_normal(len(place)), place


def test_groups_are_drawn_together():
    draw, held, alone = np.random.default_rng(0), 0, 0
    for seed in range(1000):
        values, place = clusters(draw, 60)
        low, high = mean_interval(np.bincount(place, weights=values), np.bincount(place), seed=seed, draws=500)
        held += low <= 0 <= high
        low, high = mean_interval(values, np.ones(len(values)), seed=seed, draws=500)
        alone += low <= 0 <= high
    assert 930 <= held <= 970
    assert alone < 750, "as if items of one group were independent"


def test_paired():
    draw = np.random.default_rng(0)
    a = draw.random(200)
    b = a + np.where(draw.random(200) < 0.4, draw.normal(0.05, 0.1, 200), 0)
    change = paired(report(a), report(b), "ndcg@10")
    assert change.value == pytest.approx((b - a).mean()) and change.items == change.groups == 200
    assert change.low < change.value < change.high
    assert change == paired(report(a), report(b), "nDCG@10"), "same seed, same answer"
    assert paired(report(a), report(b), "nDCG@10", seed=1).low == pytest.approx(change.low, abs=2e-3)
    back = paired(report(b), report(a), "nDCG@10")
    assert back.value == -change.value and back.p == pytest.approx(change.p, abs=0.01)
    assert stats.ttest_rel(a, b).pvalue == pytest.approx(change.p, abs=0.01)


def test_items_in_groups():
    draw = np.random.default_rng(1)
    values, place = clusters(draw, 30)
    zero, names = report(np.zeros(len(values))), [f"topic {g}" for g in place]
    together, alone = paired(zero, report(values), "nDCG@10", groups=names), paired(zero, report(values), "nDCG@10")
    assert together.groups == 30 and together.value == alone.value == pytest.approx(values.mean())
    assert together.high - together.low > 1.3 * (alone.high - alone.low)
    assert together.p > alone.p


def test_memory_is_bounded(monkeypatch):
    values = np.random.default_rng(2).standard_normal(300)
    whole = mean_interval(values, np.ones(300), draws=400), sign_flip(values, draws=4000)
    sizes, draw = [], compare._drawn_rows

    def watched(*arguments):
        for rows in draw(*arguments):
            sizes.append(rows.size)
            yield rows

    monkeypatch.setattr(compare, "NUMBERS", 1000)
    monkeypatch.setattr(compare, "_drawn_rows", watched)
    assert mean_interval(values, np.ones(300), draws=400) == pytest.approx(whole[0])
    assert sign_flip(values, draws=4000) == pytest.approx(whole[1], abs=0.04)
    assert max(sizes) <= 1000 and len(sizes) > 100


def test_no_change_at_all():
    change = paired(report(np.ones(50)), report(np.ones(50)), "nDCG@10")
    assert change == Difference(0, 0, 0, 50, 50, 1) and not change.clear


@pytest.mark.parametrize("seed", range(5))
def test_few_differences_are_tested_exactly(seed):
    changed = np.round(np.random.default_rng(seed).normal(0.3, 1, 9), 1)
    totals = [abs(np.dot(signs, changed)) for signs in itertools.product((-1, 1), repeat=9)]
    wanted = np.mean(np.array(totals) >= abs(changed.sum()) - 1e-9)
    assert sign_flip(np.concatenate([changed, np.zeros(40)])) == pytest.approx(wanted)
    assert sign_flip(-changed) == pytest.approx(wanted)


def test_many_differences_are_tested_by_drawing(monkeypatch):
    changed = np.random.default_rng(3).normal(0.4, 1, 17)
    exact = sign_flip(changed)
    monkeypatch.setattr(compare, "EXACT", 5)
    assert sign_flip(changed) == pytest.approx(exact, abs=0.015)
    assert sign_flip(np.ones(200)) == 1 / 10_001


def test_p_is_below_5_percent_5_times_of_100_where_nothing_is_to_be_found():
    draw = np.random.default_rng(4)
    ps = [sign_flip(draw.choice([-1, 1], 60) * draw.choice([0, 0.1, 0.4], 60), seed=i, draws=500) for i in range(2000)]
    assert 0.035 <= np.mean(np.array(ps) <= 0.05) <= 0.065


def predictions(draw, n: int, gain: float = 1.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gold scores 0 to 5 with ties, and two models' cosines that share a part of their errors."""
    gold, shared = draw.standard_normal((2, n))
    a, b = (
        gold + 0.7 * shared + 0.5 * draw.standard_normal(n),
        gain * gold + 0.7 * shared + 0.4 * draw.standard_normal(n),
    )
    return np.clip(np.round(2.5 + 1.3 * gold), 0, 5), a, b


@pytest.mark.parametrize("name, theirs", [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
def test_intervals_of_correlations(name, theirs):
    whole = predictions(np.random.default_rng(5), 500_000)
    truth = theirs(whole[0], whole[2])[0] - theirs(whole[0], whole[1])[0]
    draw, held = np.random.default_rng(6), 0
    for seed in range(600):
        gold, a, b = predictions(draw, 60)
        change = paired(similarity(gold, a), similarity(gold, b), name, seed=seed, draws=400)
        held += change.low <= truth <= change.high
        assert change.value == pytest.approx(theirs(gold, b)[0] - theirs(gold, a)[0])
    assert 0.93 <= held / 600 <= 0.975


def test_p_of_a_correlation_agrees_with_its_interval():
    draw = np.random.default_rng(7)
    for gain in (1, 1.1, 1.2, 1.4, 2):
        gold, a, b = predictions(draw, 80, gain)
        change = paired(similarity(gold, a), similarity(gold, b), "Spearman")
        assert (change.p < 0.05) == change.clear
    assert paired(similarity(gold, a), similarity(gold, a), "pearson") == Difference(0, 0, 0, 80, 80, 1)


def test_groups_of_correlations():
    gold, a, b = predictions(np.random.default_rng(8), 40)
    twice = [np.repeat(x, 5) for x in (gold, a, b)]
    alone = paired(similarity(gold, a), similarity(gold, b), "spearman")
    together = paired(
        *(similarity(twice[0], twice[1]), similarity(twice[0], twice[2]), "spearman"), groups=np.repeat(range(40), 5)
    )
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert together.items == 200 and together.groups == 40


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="different items: 3 of d and 2 of d"):
        paired(report([1, 0, 1]), report([1, 0]), "nDCG@10")
    with pytest.raises(UserError, match="'nDCG@10' was not measured; there are MAP"):
        paired(report([1, 0]), report([1, 1], name="MAP"), "nDCG@10")
    with pytest.raises(UserError, match="1 items in 1 groups"):
        paired(report([1]), report([0]), "nDCG@10")
    with pytest.raises(UserError, match="in 1 groups"):
        paired(report([1, 0]), report([0, 1]), "nDCG@10", groups=["same", "same"])
    with pytest.raises(UserError, match="different gold"):
        paired(similarity([1, 2, 3], [1, 2, 3]), similarity([1, 2, 4], [1, 2, 3]), "spearman")


def change_of(low, high, value=None) -> Difference:
    return Difference((low + high) / 2 if value is None else value, low, high, 9, 9)


def test_verdict():
    win, loss, unclear = change_of(0.01, 0.03), change_of(-0.03, -0.01), change_of(-0.01, 0.02)
    assert verdict([win]) == "WIN"
    assert verdict([loss]) == "REGRESSION"
    assert verdict([unclear]) == verdict([change_of(0, 0)]) == verdict([change_of(0, 0.02)]) == "MARGINAL"
    assert verdict([win, unclear]) == "WIN"
    assert verdict([win, change_of(-0.02, 0.01)]) == "MARGINAL", "one of them is below zero"
    assert verdict([win, loss]) == "REGRESSION"


def test_table():
    header, rows = compare.table(
        {"nDCG@10": Difference(0.0123, -0.001, 0.02, 1000, 1000, 0.04), "MAP": change_of(0, 0)}
    )
    assert header == ["measure", "difference", "95 % interval", "p", "items"]
    assert rows[0] == ["nDCG@10", "+0.0123", "-0.0010 to +0.0200", "0.0400", "1,000"]
    assert rows[1][3] == "-"


def test_the_queries_that_changed_most():
    data = RetrievalSet(
        *("d", {f"q{n}": f"query {n}" for n in range(4)}, {k: f"text {k}" for k in "abcd"}),
        {"q0": {"a": 2, "b": 0}, "q1": {"b": 1}, "q2": {"c": 1}, "q3": {"d": 1}},
    )
    found = [[("a", 0.9), ("b", 0.8)], [("b", 0.7)], [("c", 0.6)], [("d", 0.5)]]
    before, after = report([0, 0.5, 1, 0.2], found=found), report([0.5, 0.5, 0, 1], found=found[::-1])
    better, worse = changed_most(before, after, "nDCG@10", 5, data=data)
    assert [change.query for change in better] == ["q3", "q0"] and [change.query for change in worse] == ["q2"]
    first = better[1]
    assert (first.text, first.before, first.after) == ("query 0", 0, 0.5)
    assert first.relevant == (("a", "text a"),)
    assert [(d.id, d.score, d.text, d.relevance) for d in first.found_before] == [
        ("a", 0.9, "text a", 2),
        ("b", 0.8, "text b", 0),
    ]
    assert [(d.id, d.relevance) for d in first.found_after] == [("d", None)]
    assert [change.query for change in changed_most(before, after, "nDCG@10", 1, data=data)[0]] == ["q3"]


def test_ratio_difference():
    rows = np.array([[8.0, 2], [9, 3], [4, 1], [6, 2]])
    change = ratio_difference(rows, rows - [[0.5, 0], [0.4, 0], [0.1, 0], [0.3, 0]], np.arange(4))
    assert change.value == pytest.approx(-1.3 / 8) and change.clear and change.p is None
