"""Tagging: entities found and missed. One is right where its type and both its ends are.

Sequences that break the rules of BIO are read as conlleval reads them (`embedtune.data.tags.spans`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from embedtune.data.tags import spans
from embedtune.judge.classification import PerClass, ratio, rows
from embedtune.judge.report import Report, check_items


def tagging_report(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    items: Sequence[str],
    model: str,
    data: str,
) -> Report:
    """The report of predicted tags for the gold tags of each sentence, BIO: precision, recall, F1 over all entities
    of all sentences together (micro), and accuracy of tokens.

    A measure that divides by nothing is 0. Raises UserError where there are no sentences, ValueError where a sentence
    has not one predicted tag for each gold one.
    """
    check_items(items, gold, predicted, data)
    if wrong := [item for item, a, b in zip(items, gold, predicted) if len(a) != len(b)]:
        raise ValueError(f"{len(wrong)} sentences of {data} have more or fewer predicted tags than gold: {wrong[0]}")
    types, counts = _counted(gold, predicted)
    entities, told, right = (counts[:, 2 + offset :: 3].sum(1) for offset in range(3))
    report = Report(
        *("tagging", data, model, 0, tuple(items), {}, {}, entities, np.stack([told, right], 1)),
        classes=types,
        counts=counts,
    )
    once = np.ones((1, len(items)))
    return replace(report, summary={name: float(measure(report, once)[0]) for name, measure in STATISTICS.items()})


def per_type(report: Report) -> list[PerClass]:
    """Precision, recall, F1 and gold entities of each type that is in gold or predicted, by name."""
    right, predicted, gold = (each[0] for each in tallies(report, np.ones((1, len(report.items)))))
    return rows(report.classes, right, predicted, gold)


def tallies(report: Report, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many entities of each type are right, were predicted and are gold: three of (B, T)."""
    gold, predicted, right = (weights @ _counts(report)[:, 2 + offset :: 3] for offset in range(3))
    return right, predicted, gold


def precision(report: Report, weights: np.ndarray) -> np.ndarray:
    """The share of predicted entities that are right, for each row of `weights` (B, n): (B,)."""
    right, predicted, _ = _tallies(report, weights)
    return ratio(right, predicted)


def recall(report: Report, weights: np.ndarray) -> np.ndarray:
    """The share of gold entities that were found: (B,)."""
    right, _, gold = _tallies(report, weights)
    return ratio(right, gold)


def f1(report: Report, weights: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall: (B,)."""
    right, predicted, gold = _tallies(report, weights)
    return ratio(2 * right, predicted + gold)


def accuracy(report: Report, weights: np.ndarray) -> np.ndarray:
    """The share of tokens whose tag is right: (B,)."""
    tokens, right = (weights @ _counts(report)[:, :2]).T
    return ratio(right, tokens)


STATISTICS: dict[str, Callable[[Report, np.ndarray], np.ndarray]] = {
    "precision": precision,
    "recall": recall,
    "F1": f1,
    "accuracy": accuracy,
}


def _counted(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The types of entities by name, and `Report.counts`."""
    true, told = ([set(spans(tags)) for tags in side] for side in (gold, predicted))
    types = sorted({kind for side in (true, told) for found in side for kind, _, _ in found})
    place = {kind: 2 + 3 * number for number, kind in enumerate(types)}
    counts = np.zeros((len(true), 2 + 3 * len(types)), np.int64)
    for row, (a, b) in enumerate(zip(true, told)):
        counts[row, :2] = len(gold[row]), sum(x == y for x, y in zip(gold[row], predicted[row]))
        for offset, found in enumerate((a, b, a & b)):
            for kind, _, _ in found:
                counts[row, place[kind] + offset] += 1
    return tuple(types), counts


def _tallies(report: Report, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entities that are right, predicted and gold: three of (B,)."""
    gold, predicted = report.judged()
    return weights @ predicted[:, 1], weights @ predicted[:, 0], weights @ gold


def _counts(report: Report) -> np.ndarray:
    if report.counts is None:
        raise ValueError("a report on tagging without its counts")
    return report.counts
