"""The baseline that every tuned head has to beat: a linear model on the untuned encoder's vectors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from embedtune import keyed

STRENGTHS = (0.01, 0.1, 1.0)  # inverse regularisation of the logistic regression, chosen on a fifth of the rows
MOST = 20_000  # rows (or words) that a probe is fitted on
PROBE = 7  # what a key is for


def some(count: int, seed: int) -> np.ndarray:
    """At most MOST of `count` rows, by key, in order."""
    return np.sort(np.argsort(keyed.key(seed, PROBE, np.arange(count)), kind="stable")[:MOST])


def classify(train: np.ndarray, labels: np.ndarray, dev: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Probabilities (n, C) of logistic regression on standardised vectors (m, D), fitted to class numbers (m,).

    A class without rows gets probability 0.
    """
    fifth = keyed.key(seed, PROBE, np.arange(len(train)) + MOST) % np.uint64(5) == 0
    strength = STRENGTHS[1]
    if len(np.unique(labels[~fifth])) > 1 and fifth.any():
        fits = {c: _logistic(train[~fifth], labels[~fifth], c).score(train[fifth], labels[fifth]) for c in STRENGTHS}
        strength = max(fits, key=lambda c: fits[c])
    fitted = _logistic(train, labels, strength)
    out = np.zeros((len(dev), classes))
    out[:, fitted.classes_] = fitted.predict_proba(dev)
    return out


def several(train: np.ndarray, labels: np.ndarray, dev: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) where each of C labels (m, C) 0/1 applies or not, one regression a label."""
    columns = []
    for column in labels.T:
        if column.min() == column.max():
            columns.append(np.full(len(dev), float(column[0])))
        else:
            columns.append(_logistic(train, column.astype(int), STRENGTHS[1]).predict_proba(dev)[:, 1])
    return np.stack(columns, 1)


def regress(train: np.ndarray, scores: np.ndarray, dev: np.ndarray) -> np.ndarray:
    """Scores (n,) of ridge regression, its strength chosen by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 11))).fit(train, scores)
    found: np.ndarray = fitted.predict(dev)
    return found


def _logistic(vectors: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 rounds are near enough for a baseline
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(vectors, labels)
