"""Linear models on the untuned encoder's vectors: the baseline that a tuned head has to beat, and where it starts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from embedtune import keyed

# Inverse regularisation of the logistic regression, chosen on a fifth of the rows; a weaker one takes longer to fit.
STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0)
USUAL = 0.1  # where nothing can be chosen
# A linear model: weights (C, D) and biases (C,), logits = vectors @ weights.T + biases.
Linear = tuple[np.ndarray, np.ndarray]
MOST = 20_000  # rows (or words) that a probe is fitted on
PROBE = 7  # what a key is for
DEAD = 1e-6  # of the widest spread


def some(count: int, seed: int) -> np.ndarray:
    """At most MOST of `count` rows, by key, in order."""
    return np.sort(np.argsort(keyed.key(seed, PROBE, np.arange(count)), kind="stable")[:MOST])


def logistic(vectors: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> Linear:
    """Logistic regression to tell C classes apart, from vectors (m, D) and class numbers (m,).

    A class without rows has a bias of minus infinity: probability 0.
    """
    weights, biases = np.zeros((classes, vectors.shape[1])), np.full(classes, -np.inf)
    if (labels == labels[0]).all():
        biases[labels[0]] = 0.0
        return weights, biases
    alive = _alive(vectors)
    train = vectors[:, alive]
    fifth = keyed.key(seed, PROBE, np.arange(len(train)) + MOST) % np.uint64(5) == 0
    strength = USUAL
    if len(np.unique(labels[~fifth])) > 1 and fifth.any():
        best = -np.inf
        for c in STRENGTHS:
            found = _likelihood(_logistic(train[~fifth], labels[~fifth], c), train[fifth], labels[fifth])
            if found <= best:  # it rises to one peak and falls again
                break
            best, strength = found, c
    fitted = _logistic(train, labels, strength)
    coefficients, offsets = _unscaled(fitted[0], fitted[1].coef_, fitted[1].intercept_)
    known = fitted[1].classes_
    if len(known) == 2:  # scikit-learn keeps one logit for two classes: that of the second against 0
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        offsets = np.concatenate([[0.0], offsets])
    weights[np.ix_(known, alive)], biases[known] = coefficients, offsets
    return weights, biases


def each(vectors: np.ndarray, labels: np.ndarray) -> Linear:
    """One logistic regression for each of C labels that apply or not, from vectors (m, D) and labels (m, C) 0/1.

    A label that always or never applies has a bias of plus or minus infinity.
    """
    weights, biases = np.zeros((labels.shape[1], vectors.shape[1])), np.zeros(labels.shape[1])
    alive = _alive(vectors)
    for number, column in enumerate(labels.T):
        if column.min() == column.max():
            biases[number] = np.inf if column[0] else -np.inf
        else:
            scaler, fitted = _logistic(vectors[:, alive], column.astype(int), USUAL)
            found, offsets = _unscaled(scaler, fitted.coef_, fitted.intercept_)
            weights[number, alive], biases[number] = found[0], offsets[0]
    return weights, biases


def ridge(vectors: np.ndarray, scores: np.ndarray) -> Linear:
    """Ridge regression from vectors (m, D) and scores (m,), its strength chosen by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weights, alive = np.zeros((1, vectors.shape[1])), _alive(vectors)
    scaler, fitted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 11))).fit(vectors[:, alive], scores)
    weights[:, alive], biases = _unscaled(scaler, fitted.coef_[None], np.array([fitted.intercept_]))
    return weights, biases


def _alive(vectors: np.ndarray) -> np.ndarray:
    """(D,) bool: dimensions that vary. A weight would blow up what is rounding in the others."""
    spread = vectors.std(0)
    alive: np.ndarray = spread > DEAD * spread.max()
    return alive


def _likelihood(fitted: Any, vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean log probability of the right classes; those that the fit has not seen cost the same whatever the strength.

    Accuracy would do for a baseline, but a head that starts too sure of itself has to unlearn it.
    """
    seen = np.isin(labels, fitted.classes_)
    if not seen.any():
        return 0.0
    right = np.searchsorted(fitted.classes_, labels[seen])
    chances = fitted.predict_log_proba(vectors[seen])
    return float(chances[np.arange(len(right)), right].mean())


def _unscaled(scaler: Any, weights: np.ndarray, biases: np.ndarray) -> Linear:
    """Weights and biases for vectors as they are, from those for standardised ones."""
    weights = weights / scaler.scale_
    return weights, biases - weights @ scaler.mean_


def _logistic(vectors: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    # Products this small are up to 30 times as fast on one thread as on two that wait for each other.
    with threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 rounds are near enough for a baseline
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(vectors, labels)
