"""Classification: how often, how evenly and how surely a model names the right class, or the right ones of several.

Every measure but accuracy and log loss is a function of the report and of how often each item counts, `weights`
(B, n): one row of ones gives the value, resamples give its interval. They are scikit-learn's numbers. Where a measure
divides by nothing (no item of a class was predicted, say) the quotient is 0, as with its zero_division=0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from embedtune.judge.report import Report, check_items

BINS = 15  # of confidence; arXiv 1706.04599
THRESHOLD = 0.5  # from which on one of several labels applies
MEASURES = ("accuracy", "balanced_accuracy", "F1", "F1_micro", "MCC", "ROC_AUC", "log_loss", "ECE")
ONE_CLASS_ONLY = ("balanced_accuracy", "MCC", "ECE")  # not where several classes may apply


class PerClass(NamedTuple):
    """One class (or type of entity): its measures, and how many gold items it has."""

    name: str
    precision: float
    recall: float
    F1: float
    support: int


def classification_report(
    gold: Sequence[int] | np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    items: Sequence[str],
    model: str,
    data: str,
    multi: bool = False,
) -> Report:
    """The report of probabilities (n, C) for gold class numbers (n,), or 0/1 (n, C) where several apply (`multi`).

    The class predicted is the one of the highest probability, the first where there are equals; of several those from
    0.5 on. accuracy then wants all of them right, and log_loss is the mean over the classes. Probabilities are clipped
    to within 2.2e-16 of 0 and 1 for log_loss. Raises UserError where there are no items, ValueError for class numbers
    and probabilities that are none.
    """
    gold, probabilities = np.asarray(gold), np.asarray(probabilities, np.float64)
    check_items(items, gold, probabilities, data)
    gold = _checked(gold, probabilities, len(classes), multi)
    named = tuple(classes)
    report = Report(
        "classification", data, model, 0, tuple(items), {}, gold=gold, predicted=probabilities, classes=named
    )
    values = {"accuracy": _right(report).astype(np.float64), "log_loss": _log_losses(report)}
    once = np.ones((1, len(gold)))
    summary = {
        name: float(values[name].mean() if name in values else STATISTICS[name](report, once)[0])
        for name in MEASURES
        if not (multi and name in ONE_CLASS_ONLY)
    }
    return replace(report, summary=summary, values=values)


def per_class(report: Report) -> list[PerClass]:
    """Precision, recall, F1 and gold items of each class, in the order of `report.classes`."""
    right, predicted, gold = (each[0] for each in tallies(report, np.ones((1, len(report.items)))))
    return rows(report.classes, right, predicted, gold)


def rows(names: Sequence[str], right: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> list[PerClass]:
    """A row for each name from how many (C,) were right, predicted and gold."""
    precision, recall, f1 = ratio(right, predicted), ratio(right, gold), ratio(2 * right, predicted + gold)
    measures = zip(precision.tolist(), recall.tolist(), f1.tolist(), gold.tolist())
    return [PerClass(name, p, r, f, int(support)) for name, (p, r, f, support) in zip(names, measures, strict=True)]


def confusion(report: Report) -> np.ndarray:
    """How many items of each class (row) were taken for each class (column): (C, C) int64.

    Raises ValueError where several classes may apply: then none is taken for another.
    """
    gold, probabilities = report.judged()
    if gold.ndim > 1:
        raise ValueError("several classes apply to an item: there is no confusion of one with another")
    count = probabilities.shape[1]
    return np.bincount(gold * count + probabilities.argmax(1), minlength=count**2).reshape(count, count)


def reliability(report: Report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and number of items in each of 15 bins of the highest probability: three of (15,).

    Confidence and accuracy are 0 where a bin is empty. Bins are open below and closed above. arXiv 1706.04599
    """
    place, confidence, right = _bins(report)
    count = np.bincount(place, minlength=BINS)
    sums = (np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right))
    mean_confidence, accuracy = (ratio(total, count) for total in sums)
    return mean_confidence, accuracy, count


def tallies(report: Report, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many items of each class were right, were predicted and are gold: three of (B, C)."""
    gold, predicted = applies(report)
    return weights @ (gold * predicted), weights @ predicted, weights @ gold


def balanced_accuracy(report: Report, weights: np.ndarray) -> np.ndarray:
    """The mean recall over the classes that have gold items: (B,)."""
    right, _, gold = tallies(report, weights)
    return ratio(right, gold).sum(1) / (gold > 0).sum(1)


def f1_macro(report: Report, weights: np.ndarray) -> np.ndarray:
    """The mean F1 over classes: (B,).

    A class without gold and predicted items is left out of the mean; where several may apply it stays in, as 0.
    """
    right, predicted, gold = tallies(report, weights)
    several = report.judged()[0].ndim > 1
    count = gold.shape[1] if several else (predicted + gold > 0).sum(1)
    return ratio(2 * right, predicted + gold).sum(1) / count


def f1_micro(report: Report, weights: np.ndarray) -> np.ndarray:
    """F1 of all decisions together: (B,). It is the accuracy where one class applies."""
    right, predicted, gold = (each.sum(1) for each in tallies(report, weights))
    return ratio(2 * right, predicted + gold)


def matthews(report: Report, weights: np.ndarray) -> np.ndarray:
    """Matthews' correlation coefficient of any number of classes (Gorodkin's R_K): (B,).

    0 where all gold items, or all predicted ones, are of one class.
    """
    right, predicted, gold = tallies(report, weights)
    total = weights.sum(1) ** 2
    together = right.sum(1) * weights.sum(1) - (predicted * gold).sum(1)
    spread = (total - (predicted**2).sum(1)) * (total - (gold**2).sum(1))
    return ratio(together, np.sqrt(spread))


def roc_auc(report: Report, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: (B,); of two classes that of the second, else the mean over each against the rest.

    The mean is over the classes that have gold items and others; 0.5 where none has.
    """
    gold, probabilities = applies(report)[0] > 0, report.judged()[1]
    second = report.judged()[0].ndim == 1 and gold.shape[1] == 2
    turned = np.ascontiguousarray(weights.T)
    area, defined = np.zeros(len(weights)), np.zeros(len(weights))
    for number in [1] if second else range(gold.shape[1]):
        won, pairs = _in_order(probabilities[:, number], gold[:, number], turned)
        area += ratio(won, pairs)
        defined += pairs > 0
    return np.where(defined > 0, area / np.maximum(defined, 1), 0.5)


def calibration_error(report: Report, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: (B,), the mean gap of confidence and accuracy in 15 bins of the highest probability.

    arXiv 1706.04599. It is never below 0, so that noise raises it: a calibrated model has about 0.02 to 0.04 on 1,000
    items, and 0.05 to 0.08 on 200.
    """
    place, confidence, right = _bins(report)
    gaps = np.eye(BINS)[place] * (right - confidence)[:, None]
    return np.abs(weights @ gaps).sum(1) / weights.sum(1)


STATISTICS: dict[str, Callable[[Report, np.ndarray], np.ndarray]] = {
    "balanced_accuracy": balanced_accuracy,
    "F1": f1_macro,
    "F1_micro": f1_micro,
    "MCC": matthews,
    "ROC_AUC": roc_auc,
    "ECE": calibration_error,
}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, float64; 0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def _checked(gold: np.ndarray, probabilities: np.ndarray, classes: int, multi: bool) -> np.ndarray:
    """Gold as int64, after a check of both."""
    wanted = (len(gold), classes)
    if probabilities.shape != wanted or gold.shape != (wanted if multi else wanted[:1]):
        raise ValueError(f"gold {gold.shape} and probabilities {probabilities.shape} of {classes} classes")
    if not (np.isin(gold, (0, 1)) if multi else np.isin(gold, np.arange(classes))).all():
        raise ValueError("gold is no number of a class" if not multi else "gold is neither 0 nor 1")
    sound = (probabilities >= 0) & (probabilities <= 1)
    if not sound.all() or not (multi or np.allclose(probabilities.sum(1), 1, rtol=0, atol=1e-3)):
        raise ValueError("the probabilities of an item do not lie between 0 and 1, or do not add up to 1")
    return gold.astype(np.int64)


def applies(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Which classes apply to each item, and which are predicted to: two of (n, C) float64, 0 or 1."""
    gold, probabilities = report.judged()
    if gold.ndim > 1:
        return gold.astype(np.float64), (probabilities >= THRESHOLD).astype(np.float64)
    one = np.eye(probabilities.shape[1])
    return one[gold], one[probabilities.argmax(1)]


def _right(report: Report) -> np.ndarray:
    """Whether all of an item's classes are predicted, and no other: (n,) bool."""
    gold, predicted = applies(report)
    return (gold == predicted).all(1)


def _log_losses(report: Report) -> np.ndarray:
    gold, probabilities = report.judged()
    least = np.finfo(np.float64).eps
    kept = probabilities.clip(least, 1 - least)
    if gold.ndim > 1:
        return -np.log(np.where(gold > 0, kept, 1 - kept)).mean(1)
    return -np.log(kept[np.arange(len(gold)), gold])


def _bins(report: Report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bin, the confidence and whether it was right, of each item: three of (n,)."""
    confidence = report.judged()[1].max(1)
    place = np.searchsorted(np.linspace(0, 1, BINS + 1), confidence, "left") - 1
    return place.clip(0), confidence, _right(report).astype(np.float64)


def _in_order(scores: np.ndarray, gold: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the pairs of a gold item and another: those whose gold item has the higher score, equals by half, and all.

    `scores` (n,), `gold` (n,) bool, `weights` (n, B); gives two of (B,). The weights of the others are summed between
    the scores of gold items only, which are few where there are many classes.
    """
    places, number = np.unique(scores[gold], return_inverse=True)
    others = scores[~gold]
    # 2k: below the k-th score of a gold item and above the one before; 2k + 1: equal to it.
    between = np.searchsorted(places, others, "left") + np.searchsorted(places, others, "right")
    mine = _sums(number, gold, len(places), weights)
    below = np.cumsum(_sums(between, ~gold, 2 * len(places) + 1, weights), axis=0)
    won = (mine * (below[:-1:2] + below[1::2])).sum(0) / 2
    return won, mine.sum(0) * below[-1]


def _sums(place: np.ndarray, chosen: np.ndarray, count: int, weights: np.ndarray) -> np.ndarray:
    """The sums (count, B) of the weights (n, B) of the `chosen` items (n,) bool that share a `place` (chosen,)."""
    from scipy.sparse import csr_array

    entries = np.ones(len(place)), (place, np.flatnonzero(chosen))
    found: np.ndarray = csr_array(entries, shape=(count, len(weights))) @ weights
    return found
