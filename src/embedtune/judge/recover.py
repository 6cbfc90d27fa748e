"""Can the group still be read from the vectors? A debiased model can hide it from one test and keep it (1903.03862)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from embedtune.errors import UserError
from embedtune.judge.score import Score, balanced, mean, numbered, score
from embedtune.nearest import Unit, top_k

FOLDS = 5
NEIGHBOURS = 10
FEWEST = 20  # texts of a group


def recoverability(
    name: str, vectors: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable], *, seed: int = 0
) -> list[Score]:
    """How well two probes and the neighbours tell labels 0 and 1 (n,) from vectors (n, D); all are 0.5 by chance.

    The probes, logistic regression and a support vector machine with an RBF kernel on standardised dimensions, are
    judged on `groups` (templates, say) that they were not fitted on, by balanced accuracy. Neighbours: the mean share
    of a text's 10 nearest of other groups that have its label. Raises UserError where a label has fewer than 20 texts,
    or where there are fewer than five groups.
    """
    place, count = numbered(groups, name)
    fewest = min(int((labels == side).sum()) for side in (0, 1))
    if fewest < FEWEST or count < FOLDS:
        what = f"{fewest:,} texts of the smaller side in {count:,} groups are too few to see whether it can be read"
        raise UserError(what, where=name, fix=f"give {FEWEST} texts of each side in {FOLDS} groups at least")
    found = []
    for kind, probe in _probes(seed).items():
        right = _held_out(probe, vectors, labels, place) == labels
        found.append(score(f"{name}: read by a {kind} probe", partial(balanced, right, labels), groups, 0.5, seed=seed))
    same = _neighbours(vectors, labels, place)
    return [*found, mean(f"{name}: neighbours of the same side", same, groups, 0.5, seed=seed)]


def _probes(seed: int) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    return {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")),
        "non-linear": make_pipeline(StandardScaler(), SVC(C=1, class_weight="balanced")),
    }


def _held_out(probe: Any, vectors: np.ndarray, labels: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The label predicted for each text (n,) by a probe that was fitted without its group."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    folds = GroupKFold(FOLDS).split(vectors, labels, place)
    predicted: np.ndarray = cross_val_predict(probe, vectors.astype(np.float64), labels, cv=list(folds))
    return predicted


def _neighbours(vectors: np.ndarray, labels: np.ndarray, place: np.ndarray) -> np.ndarray:
    """For each text the share (n,) of its nearest of other groups that have its label."""
    found = np.zeros(len(vectors))
    for group in range(place.max() + 1):
        mine, others = np.flatnonzero(place == group), np.flatnonzero(place != group)
        _, near = top_k(Unit(vectors[mine]), Unit(vectors[others]), NEIGHBOURS)
        found[mine] = (labels[others[near]] == labels[mine, None]).mean(1)
    return found
