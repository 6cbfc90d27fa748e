"""The measures that are no means of per-item values: how each is computed anew on every resample of the items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embedtune.judge import classification, regression, tagging
from embedtune.judge.report import Report, Task
from embedtune.judge.similarity import CORRELATIONS

# From a report and how often each item counts, (B, n), to the measure on each resample, (B,).
Statistic = Callable[[Report, np.ndarray], np.ndarray]
KEPT = ("gold", "predicted", "counts")  # of a report, an entry for each item
LOWER = frozenset({"log_loss", "ECE", "MAE", "RMSE"})  # measures of which less is better
# Measures that few items of a class or a bin put off on average, and the fewer items of a resample once more.
BIASED = frozenset({"F1", "ECE"})
# Measures of the answers alone: they change only with items whose answer does.
OF_ANSWERS = frozenset({"accuracy", "balanced_accuracy", "F1", "F1_micro", "MCC", "precision", "recall"})


# From the same to how many of each class are right, predicted and gold: three of (B, C).
TALLIES: Mapping[Task, Callable[[Report, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
    "classification": classification.tallies,
    "tagging": tagging.tallies,
}


def answered_otherwise(a: Report, b: Report) -> np.ndarray:
    """(n,) bool: items that two reports of the same items answer differently; all, where there are no answers."""
    if a.task == "classification":
        changed: np.ndarray = (classification.applies(a)[1] != classification.applies(b)[1]).any(1)
        return changed
    if a.counts is not None and b.counts is not None and a.classes == b.classes:
        return np.asarray((a.counts != b.counts).any(1))
    return np.ones(len(a.items), bool)


def part(report: Report, rows: slice) -> Report:
    """The report of some of the items, every measure computed anew."""
    n = len(report.items[rows])
    cut: dict[str, Any] = {name: None if (table := getattr(report, name)) is None else table[rows] for name in KEPT}
    values = {name: each[rows] for name, each in report.values.items()}
    small = dataclasses.replace(report, items=report.items[rows], found=report.found[rows], values=values, **cut)
    known = STATISTICS[report.task]
    summary = {name: float(each.mean()) for name, each in values.items()}
    summary |= {name: float(known[name](small, np.ones((1, n)))[0]) for name in report.summary if name in known}
    return dataclasses.replace(small, summary=summary)


def _of_scores(measure: Callable[..., np.ndarray]) -> Statistic:
    return lambda report, weights: measure(*report.judged(), weights)


STATISTICS: Mapping[Task, Mapping[str, Statistic]] = {
    "retrieval": {},
    "similarity": {name: _of_scores(measure) for name, measure in CORRELATIONS.items()},
    "classification": classification.STATISTICS,
    "regression": {name: _of_scores(measure) for name, measure in regression.MEASURES.items()},
    "tagging": tagging.STATISTICS,
}
