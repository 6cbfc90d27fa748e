"""The measures that are no means of per-item values: how each is computed anew on every resample of the items."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from embedtune.judge import classification, regression, tagging
from embedtune.judge.report import Report, Task
from embedtune.judge.similarity import CORRELATIONS

# From a report and how often each item counts, (B, n), to the measure on each resample, (B,).
Statistic = Callable[[Report, np.ndarray], np.ndarray]
LOWER = frozenset({"log_loss", "ECE", "MAE", "RMSE"})  # measures of which less is better
# Measures that few items of a class or a bin put off on average, and the fewer items of a resample once more.
BIASED = frozenset({"F1", "ECE"})


# From the same to how many of each class are right, predicted and gold: three of (B, C).
TALLIES: Mapping[Task, Callable[[Report, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
    "classification": classification.tallies,
    "tagging": tagging.tallies,
}


def _of_scores(measure: Callable[..., np.ndarray]) -> Statistic:
    return lambda report, weights: measure(*report.judged(), weights)


STATISTICS: Mapping[Task, Mapping[str, Statistic]] = {
    "retrieval": {},
    "similarity": {name: _of_scores(measure) for name, measure in CORRELATIONS.items()},
    "classification": classification.STATISTICS,
    "regression": {name: _of_scores(measure) for name, measure in regression.MEASURES.items()},
    "tagging": tagging.STATISTICS,
}
