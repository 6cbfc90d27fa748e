import itertools

import numpy as np
import pytest
from scipy import stats

from embedtune.data.retrieval import RetrievalSet
from embedtune.errors import UserError
from embedtune.judge import compare
from embedtune.judge.classification import MEASURES, classification_report
from embedtune.judge.compare import (
    Difference,
    changed_most,
    interval,
    mean_interval,
    paired,
    ratio_difference,
    sign_flip,
    verdict,
)
from embedtune.judge.regression import regression_report
from embedtune.judge.report import Report
from embedtune.judge.tagging import tagging_report


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


def classified(draw, n: int, classes: int = 4, skill: float = 1.5, gold=None, model="m") -> Report:
    """Classes that are not equally frequent, and probabilities that are not calibrated."""
    shares = 1 / np.arange(1, classes + 1)
    gold = draw.choice(classes, n, p=shares / shares.sum()) if gold is None else gold
    likely = np.exp(1.5 * draw.standard_normal((n, classes)) + 1.5 * skill * np.eye(classes)[gold])
    names = [f"class {number}" for number in range(classes)]
    items = tuple(map(str, range(n)))
    return classification_report(gold, likely / likely.sum(1, keepdims=True), names, items=items, model=model, data="d")


def several_classes(draw, n: int, skill: float) -> Report:
    gold = np.arange(n * 3).reshape(n, 3) % 5 < 2
    likely = 1 / (1 + np.exp(-2 * draw.standard_normal((n, 3)) - skill * (2 * gold - 1)))
    return classification_report(gold, likely, "abc", items=tuple(map(str, range(n))), model="m", data="d", multi=True)


def regressed(draw, n: int, skill: float) -> Report:
    gold = np.arange(n) % 7 / 2
    return regression_report(
        gold, gold + draw.standard_normal(n) / skill, items=tuple(map(str, range(n))), model="m", data="d"
    )


def tagged(draw, n: int, skill: float) -> Report:
    tags = ["O", "B-A", "I-A", "B-B"]
    gold = [[tags[(row * 7 + place * place) % 4] for place in range(6)] for row in range(n)]
    keep = 1 - 0.4 / skill
    predicted = [[tag if draw.random() < keep else tags[draw.integers(4)] for tag in row] for row in gold]
    return tagging_report(gold, predicted, items=tuple(map(str, range(n))), model="m", data="d")


def one_class(draw, n: int, skill: float) -> Report:
    return classified(draw, n, skill=skill, gold=np.arange(n) % 4)


TASKS = {made.__name__: made for made in (one_class, several_classes, regressed, tagged)}
KINDS = [(task, name) for task, made in TASKS.items() for name in made(np.random.default_rng(0), 9, 1).summary]


def test_all_measures_are_there():
    assert [name for task, name in KINDS if task == "one_class"] == list(MEASURES) and len(KINDS) == 8 + 5 + 5 + 4


@pytest.mark.parametrize("task, name", KINDS)
def test_every_measure_of_every_task_has_intervals(task, name):
    a, b = TASKS[task](np.random.default_rng(0), 150, 1), TASKS[task](np.random.default_rng(1), 150, 3)
    for report in (a, b):
        low, high = interval(report, name.upper(), draws=500)
        assert low < report.summary[name] < high, "of one report"
        assert interval(report, name, draws=500) == (low, high), "same seed, same answer"
    change = paired(a, b, name, draws=1000)
    assert change.value == pytest.approx(b.summary[name] - a.summary[name], abs=1e-12)
    assert change.low < change.value < change.high and change.items == change.groups == 150
    assert change.clear == (change.p < 0.05)
    if name != "ECE":
        assert verdict([change]) == "WIN"
    assert paired(a, a, name, draws=200).value == 0 and verdict([paired(a, a, name, draws=200)]) == "MARGINAL"


@pytest.mark.parametrize("task, name", KINDS)
def test_groups_of_every_measure(task, name):
    """An item five times tells no more than once."""
    once = TASKS[task](np.random.default_rng(2), 40, 1)
    alone = interval(once, name, draws=1000)
    five = {key: np.repeat(values, 5) for key, values in once.values.items()}
    kept = {key: np.repeat(getattr(once, key), 5, axis=0) for key in ("gold", "predicted")}
    counts = None if once.counts is None else np.repeat(once.counts, 5, axis=0)
    items = tuple(f"{item}:{number}" for item in once.items for number in range(5))
    many = Report(once.task, "d", "m", 0, items, once.summary, five, **kept, classes=once.classes, counts=counts)
    together = interval(many, name, groups=[f"{number // 5:02}" for number in range(200)], draws=1000)
    assert together == pytest.approx(alone, abs=1e-9)
    wide, narrow = together[1] - together[0], np.subtract(*interval(many, name, draws=1000)[::-1])
    # That of ECE ends at 0.
    assert name == "ECE" or wide > 1.5 * narrow, "as if they were items of their own"


def test_intervals_of_accuracy_and_f1_hold_the_truth():
    truth = classified(np.random.default_rng(10), 300_000).summary
    held = dict.fromkeys(("accuracy", "F1"), 0)
    for seed in range(400):
        found = classified(np.random.default_rng([11, seed]), 150)
        for name in held:
            low, high = interval(found, name, seed=seed, draws=400)
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert 0.92 <= count / 400 <= 0.98, name


def test_memory_of_many_items_in_few_groups_is_bounded(monkeypatch):
    found, groups = classified(np.random.default_rng(3), 200), [f"{number % 5}" for number in range(200)]
    whole, sizes = interval(found, "MCC", groups=groups, draws=300), []
    of_mcc = compare.STATISTICS["classification"]["MCC"]

    def watched(report, weights):
        sizes.append(weights.size)
        return of_mcc(report, weights)

    monkeypatch.setattr(compare, "NUMBERS", 4000)
    monkeypatch.setitem(compare.STATISTICS["classification"], "MCC", watched)
    assert interval(found, "MCC", groups=groups, draws=300) == whole
    assert max(sizes) <= 4000 and len(sizes) >= 15


def test_intervals_of_a_mean():
    draw = np.random.default_rng(12)
    held = 0
    for seed in range(1000):
        low, high = interval(report(draw.random(40) < 0.9), "nDCG@10", seed=seed, draws=300)
        assert 0 <= low < high <= 1
        held += low <= 0.9 <= high
    assert held >= 930, "a plain percentile interval holds it 88 times of 100"
    low, high = interval(report(np.ones(50)), "nDCG@10")
    assert 0.9 < low < 0.97 and high == 1, "50 right answers of 50"
    assert interval(report(np.zeros(50)), "nDCG@10") == pytest.approx((0, 1 - low), abs=0.01)
    loss = report(4 + draw.random(300), name="log_loss")
    low, high = interval(loss, "log_loss")
    wanted = stats.t.interval(0.95, 299, loss.summary["log_loss"], stats.sem(loss.values["log_loss"]))
    assert (low, high) == pytest.approx(wanted, abs=0.004)


def test_bias_of_many_classes_is_taken_away():
    """F1 of 40 classes is lower on few items than on many, and on resamples once more."""
    truth = classified(np.random.default_rng(13), 60_000, 40, 3).summary["F1"]
    held, off = 0, []
    for seed in range(80):
        found = classified(np.random.default_rng([14, seed]), 300, 40, 3)
        low, high = interval(found, "F1", seed=seed, draws=150)
        held += low <= truth <= high
        off.append((found.summary["F1"] - truth, (low + high) / 2 - truth))
    plain, middle = np.mean(off, axis=0)
    assert held >= 70 and plain < -0.01 and abs(middle) < abs(plain) / 2


def test_less_of_a_loss_is_a_gain():
    rng = np.random.default_rng
    a, b = regressed(rng(1), 200, 1), regressed(rng(2), 200, 3)
    for name, sign in (("MAE", -1), ("RMSE", -1), ("R2", 1)):
        better, worse = paired(a, b, name, draws=500), paired(b, a, name, draws=500)
        assert better.lower == (name in compare.LOWER) == (sign < 0) and sign * better.value > 0
        assert verdict([better]) == "WIN" and verdict([worse]) == "REGRESSION"
        assert verdict([better, worse]) == "REGRESSION"
    falls, unclear = Difference(-0.1, -0.2, -0.05, 9, 9, lower=True), Difference(0.01, -0.1, 0.1, 9, 9, lower=True)
    assert verdict([falls]) == "WIN" and verdict([falls, unclear]) == "MARGINAL", "one of them is above zero"


def test_classes_and_gold_must_be_the_same():
    rng = np.random.default_rng
    a, b = classified(rng(0), 30), classified(rng(1), 30)
    for name in ("accuracy", "F1"):
        with pytest.raises(UserError, match="different gold"):
            paired(a, b, name)
        with pytest.raises(UserError, match="different classes"):
            paired(a, classified(rng(0), 30, 5), name)
    with pytest.raises(UserError, match="in 1 groups"):
        interval(a, "F1", groups=["same"] * 30)
    with pytest.raises(UserError, match="'nothing' was not measured"):
        interval(a, "nothing")
    bare = Report("similarity", "d", "m", 8, ("a", "b", "c"), {"spearman": 0.5})
    with pytest.raises(UserError, match="keeps no predictions"):
        interval(bare, "spearman")
    with pytest.raises(UserError, match="keep no values of MAP"):
        interval(Report("retrieval", "d", "m", 8, ("a", "b", "c"), {"MAP": 0.5}), "MAP")


# ---- intervals of single classes


def one_of(gold, said, classes):
    return classification_report(gold, np.eye(classes)[said], [str(n) for n in range(classes)],
                                 items=[str(n) for n in range(len(gold))], model="m", data="d")  # fmt: skip


@pytest.mark.parametrize("items, share, recall", [(300, 0.04, 0.9), (300, 0.5, 0.7), (200, 0.1, 0.97)])
def test_intervals_of_f1_of_a_class_hold_the_truth(items, share, recall):
    """Drawn anew 150 times from a population whose F1 is known."""
    draw, wrong = np.random.default_rng(0), 0.1 * share
    precision = share * recall / (share * recall + (1 - share) * wrong)
    truth, held = 2 * precision * recall / (precision + recall), 0
    for _ in range(150):
        gold = (draw.random(items) < share).astype(int)
        said = np.where(gold == 1, draw.random(items) < recall, draw.random(items) < wrong).astype(int)
        row = compare.by_class(one_of(gold, said, 2), draws=300)[1]
        held += row.low <= truth <= row.high
        assert 0 <= row.low <= row.high <= 1
    assert held >= 0.9 * 150


def test_a_class_that_was_always_right_is_not_sure_and_one_without_items_may_be_anything():
    gold = np.array([0] * 30 + [1] * 5)
    rows = compare.by_class(one_of(gold, gold, 3))
    assert [row.F1 for row in rows] == [1, 1, 0] and [row.support for row in rows] == [30, 5, 0]
    assert 0.85 < rows[0].low < 1 and rows[1].low < rows[0].low and rows[2].high - rows[2].low == 1
    assert compare.by_class(one_of(gold, gold, 3)) == rows


def answers(gold, said):
    chances = np.where(np.arange(3) == np.array(said)[:, None], 0.8, 0.1)
    return classification_report(np.array(gold), chances, list("abc"), items=[str(n) for n in range(len(gold))],
                                 model="", data="")  # fmt: skip


@pytest.mark.parametrize("n, changed", [(10, 1), (100, 1), (200, 5)])
def test_a_handful_of_changed_answers_is_never_clear(n, changed):
    gold = np.arange(n) % 3
    worse = gold.copy()
    worse[:changed] = (gold[:changed] + 1) % 3
    for measure in ("F1", "F1_micro", "MCC", "balanced_accuracy"):
        found = compare.paired(answers(gold, gold), answers(gold, worse), measure)
        assert found.value < 0 and not found.clear and found.p > 0.05


def test_many_changed_answers_are_clear():
    gold = np.arange(200) % 3
    worse = np.where(np.arange(200) < 20, (gold + 1) % 3, gold)
    assert compare.paired(answers(gold, gold), answers(gold, worse), "F1").clear
