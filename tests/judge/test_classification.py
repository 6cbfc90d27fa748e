import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn import metrics

from embedtune.errors import UserError
from embedtune.judge.classification import (
    MEASURES,
    STATISTICS,
    classification_report,
    confusion,
    per_class,
    reliability,
)
from embedtune.judge.report import from_dict

ABOUT = {"model": "m", "data": "d"}


def judged(gold, probabilities, multi=False):
    classes = [f"class {n}" for n in range(probabilities.shape[1])]
    items = [f"f.csv:{n}" for n in range(len(gold))]
    return classification_report(gold, probabilities, classes, items=items, multi=multi, **ABOUT)


def one_of(seed: int, n: int, count: int, seen: int | None = None, said: int | None = None):
    """Gold of the first `seen` classes and probabilities that like the first `said` ones; scores have ties."""
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, seen or count, n)
    logits = np.round(draw.standard_normal((n, count)), 1) + 1.5 * np.eye(count)[gold]
    logits[:, said or count :] -= 50
    return gold, softmax(logits, axis=1)


def some_of(seed: int, n: int, count: int, empty: int = 0):
    """0/1 of several classes, of which the first `empty` never apply and the last `empty` are never predicted."""
    draw = np.random.default_rng(seed)
    gold = (draw.random((n, count)) < 0.3).astype(int)
    gold[:, :empty] = 0
    logits = np.round(draw.standard_normal((n, count)) + 2 * gold - 1, 1)
    logits[:, count - empty :] -= 50
    return gold, expit(logits)


def auc_of(gold, scores) -> list[float]:
    """scikit-learn's area for each column of 0/1 that has both."""
    columns = [n for n in range(gold.shape[1]) if 0 < gold[:, n].sum() < len(gold)]
    return [metrics.roc_auc_score(gold[:, n], scores[:, n]) for n in columns]


def theirs(gold, probabilities) -> dict[str, float]:
    """The measures as scikit-learn has them, of which it warns and not of which it knows nothing."""
    labels = range(probabilities.shape[1])
    predicted = probabilities.argmax(1)
    areas = auc_of(np.eye(len(labels), dtype=int)[gold], probabilities)
    return {
        "accuracy": metrics.accuracy_score(gold, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(gold, predicted),
        "F1": metrics.f1_score(gold, predicted, average="macro", zero_division=0),
        "F1_micro": metrics.f1_score(gold, predicted, average="micro", zero_division=0),
        "MCC": metrics.matthews_corrcoef(gold, predicted),
        "ROC_AUC": (areas[1] if len(labels) == 2 and areas else np.mean(areas)) if areas else 0.5,
        "log_loss": metrics.log_loss(gold, probabilities, labels=labels),
    }


def same(report, gold, probabilities):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs(gold, probabilities)
    assert tuple(report.summary) == MEASURES
    assert {name: report.summary[name] for name in wanted} == pytest.approx(wanted, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 7, 77])
@pytest.mark.parametrize("n", [5, 400])
def test_same_as_scikit_learn(n, count):
    gold, probabilities = one_of(n + count, n, count)
    same(judged(gold, probabilities), gold, probabilities)


@pytest.mark.parametrize("seen, said", [(3, 5), (5, 3), (2, 2), (1, 5), (5, 1), (1, 1)])
def test_classes_that_are_missing(seen, said):
    """In gold, in predictions, in both: no measure becomes NaN, and all are scikit-learn's."""
    gold, probabilities = one_of(1, 90, 5, seen, said)
    report = judged(gold, probabilities)
    same(report, gold, probabilities)
    assert np.isfinite(list(report.summary.values())).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 10**6))
def test_a_few_items_of_any_classes(n, count, seed):
    gold, probabilities = one_of(seed, n, count)
    same(judged(gold, probabilities), gold, probabilities)


def test_macro_area_of_several_classes():
    gold, probabilities = one_of(2, 300, 6)
    wanted = metrics.roc_auc_score(gold, probabilities, multi_class="ovr", average="macro")
    assert judged(gold, probabilities).summary["ROC_AUC"] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("n, count, empty", [(300, 5, 0), (300, 6, 2), (1, 3, 0), (2, 4, 1)])
def test_several_classes_at_once(n, count, empty):
    gold, probabilities = some_of(n, n, count, empty)
    report, predicted = judged(gold, probabilities, multi=True), (probabilities >= 0.5).astype(int)
    wanted = {
        "accuracy": metrics.accuracy_score(gold, predicted),
        "F1": metrics.f1_score(gold, predicted, average="macro", zero_division=0),
        "F1_micro": metrics.f1_score(gold, predicted, average="micro", zero_division=0),
        "ROC_AUC": np.mean(auc_of(gold, probabilities) or 0.5),
        "log_loss": np.mean([metrics.log_loss(*side, labels=[0, 1]) for side in zip(gold.T, probabilities.T)]),
    }
    assert list(report.summary) == list(wanted)
    assert report.summary == pytest.approx(wanted, abs=1e-12, rel=1e-12)
    rows = metrics.precision_recall_fscore_support(gold, predicted, zero_division=0)
    np.testing.assert_allclose([row[1:] for row in per_class(report)], np.transpose(rows), atol=1e-12)
    with pytest.raises(ValueError, match="several classes"):
        confusion(report)


def test_each_class():
    gold, probabilities = one_of(3, 200, 6, 5, 4)
    report, predicted = judged(gold, probabilities), probabilities.argmax(1)
    found, labels = per_class(report), range(6)
    assert [row.name for row in found] == list(report.classes)
    wanted = metrics.precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    np.testing.assert_allclose([row[1:] for row in found], np.transpose(wanted), atol=1e-12)
    table = confusion(report)
    np.testing.assert_array_equal(table, metrics.confusion_matrix(gold, predicted, labels=labels))
    assert table.sum(1).tolist() == [row.support for row in found] and table.dtype == np.int64


def test_values_of_items():
    gold, probabilities = one_of(4, 50, 3)
    report = judged(gold, probabilities)
    assert set(report.values) == {"accuracy", "log_loss"}
    for name, values in report.values.items():
        assert report.summary[name] == values.mean()
    np.testing.assert_allclose(report.values["log_loss"], -np.log(probabilities[np.arange(50), gold]))
    sure = judged(np.array([0, 1]), np.array([[0.0, 1], [0, 1]]))
    assert sure.summary["log_loss"] == pytest.approx(metrics.log_loss([0, 1], [[0.0, 1], [0, 1]], labels=[0, 1]))


def calibration(gold, probabilities) -> float:
    """arXiv 1706.04599, equation 3, bin by bin."""
    top, right, total = probabilities.max(1), probabilities.argmax(1) == gold, 0.0
    for m in range(15):
        inside = (top > m / 15) & (top <= (m + 1) / 15)
        if inside.any():
            total += inside.sum() / len(gold) * abs(right[inside].mean() - top[inside].mean())
    return total


@pytest.mark.parametrize("count", [2, 4, 30])
def test_calibration(count):
    gold, probabilities = one_of(5, 500, count)
    report = judged(gold, probabilities)
    assert report.summary["ECE"] == pytest.approx(calibration(gold, probabilities), abs=1e-12)
    confidence, accuracy, items = reliability(report)
    assert len(items) == 15 and items.sum() == 500
    assert (items * abs(confidence - accuracy)).sum() / 500 == pytest.approx(report.summary["ECE"])
    assert (accuracy * items).sum() / 500 == pytest.approx(report.summary["accuracy"])
    assert not confidence[items == 0].any() and (np.diff(confidence[items > 0]) > 0).all()


def test_edges_of_confidence():
    report = judged(np.array([0, 0, 1]), np.array([[1.0, 0], [0.6, 0.4], [0.5, 0.5]]))
    assert np.flatnonzero(reliability(report)[2]).tolist() == [7, 8, 14], "0.6 is the upper edge of the ninth bin"
    assert report.values["accuracy"].tolist() == [1, 1, 0], "of equals the first"


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("multi", [False, True])
def test_weights_are_repetitions(name, multi):
    """Each row of weights gives the measure of a report in which every item stands so often."""
    gold, probabilities = some_of(6, 80, 4, 1) if multi else one_of(6, 80, 4, 3)
    report = judged(gold, probabilities, multi)
    if name not in report.summary:
        return
    weights = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), 20)
    weights[0], weights[1] = 0, 0
    weights[0, 7], weights[1, :3] = 5, 1
    found = STATISTICS[name](report, weights.astype(float))
    for row, value in zip(weights, found):
        repeated = judged(np.repeat(gold, row, axis=0), np.repeat(probabilities, row, axis=0), multi)
        assert value == pytest.approx(repeated.summary[name], abs=1e-12)


def test_2000_resamples_of_3000_items_in_77_classes_take_seconds():
    report = judged(*one_of(7, 3000, 77))
    weights = np.random.default_rng(0).multinomial(3000, np.full(3000, 1 / 3000), 500).astype(float)
    started = time.process_time()
    for statistic in STATISTICS.values():
        assert statistic(report, weights).shape == (500,)
    assert 4 * (time.process_time() - started) < 20, "all of the measures together"


def test_goes_through_json():
    for multi in (False, True):
        gold, probabilities = some_of(8, 30, 3) if multi else one_of(8, 30, 3)
        report = judged(gold, probabilities, multi)
        again = from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
        assert again.as_dict() == report.as_dict() and again.classes == ("class 0", "class 1", "class 2")
        assert again.gold.dtype == report.gold.dtype and again.predicted.shape == report.predicted.shape
        assert per_class(again) == per_class(report)
        for name, statistic in STATISTICS.items():
            if name in report.summary:
                assert statistic(again, np.ones((1, 30)))[0] == report.summary[name]
    assert report.dim == 0 and report.task == "classification"


def test_what_cannot_be_judged():
    gold, probabilities = one_of(9, 5, 3)
    with pytest.raises(UserError, match="d: has nothing to judge on"):
        judged(gold[:0], probabilities[:0])
    with pytest.raises(ValueError, match="5 items, 4 gold"):
        classification_report(gold[:4], probabilities, "abc", items="abcde", **ABOUT)
    with pytest.raises(ValueError, match="of 2 classes"):
        classification_report(gold, probabilities, "ab", items="abcde", **ABOUT)
    with pytest.raises(ValueError, match="no number of a class"):
        judged(np.array([0, 1, 3, 0, 0]), probabilities)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        judged(np.full((5, 3), 2), probabilities, multi=True)
    for wrong in (np.nan, -0.1, 1.5, 0.1):
        probabilities[2, 0] = wrong
        with pytest.raises(ValueError, match="add up to 1"):
            judged(gold, probabilities)
