"""Regression: how well predicted scores follow the gold ones, and how far they are off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from embedtune.judge.report import Report, check_items
from embedtune.judge.similarity import pearson, spearman


def regression_report(
    gold: Sequence[float] | np.ndarray,
    predicted: Sequence[float] | np.ndarray,
    *,
    items: Sequence[str],
    model: str,
    data: str,
) -> Report:
    """The report of predicted scores (n,) for gold scores (n,): pearson, spearman, MAE, RMSE and R2.

    Raises UserError where there are no items, ValueError for scores that are not finite.
    """
    gold, predicted = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
    check_items(items, gold, predicted, data)
    if gold.ndim > 1 or gold.shape != predicted.shape or not (np.isfinite(gold) & np.isfinite(predicted)).all():
        raise ValueError(f"scores of {data} are not finite, or not one for each item: {gold.shape}, {predicted.shape}")
    values = {"MAE": np.abs(predicted - gold)}
    found = {name: float(measure(gold, predicted)[0]) for name, measure in MEASURES.items()}
    names = ("pearson", "spearman", "MAE", "RMSE", "R2")
    summary = {name: found[name] if name in found else float(values[name].mean()) for name in names}
    return Report("regression", data, model, 0, tuple(items), summary, values, gold, predicted)


def rmse(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Root of the mean squared error of (n,) for each row of `weights` (B, n), how often an item counts: (B,)."""
    weights = np.ones((1, len(gold))) if weights is None else weights
    return np.sqrt(weights @ (predicted - gold) ** 2 / weights.sum(1))


def r2(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The share of the spread of gold that is explained, 1 - squared errors / squared distances from the mean: (B,).

    Where the gold scores are all the same it is 1 if all are met, else 0, as in scikit-learn.
    """
    weights = np.ones((1, len(gold))) if weights is None else weights
    total = weights.sum(1)
    error = weights @ (predicted - gold) ** 2
    spread = (weights * (gold - (weights @ gold / total)[:, None]) ** 2).sum(1)
    varies = spread > total * (1e-12 * np.abs(gold).max()) ** 2  # what rounding leaves of a constant is no spread
    return np.where(varies, 1 - error / np.where(varies, spread, 1), error == 0)


MEASURES: dict[str, Callable[..., np.ndarray]] = {"pearson": pearson, "spearman": spearman, "RMSE": rmse, "R2": r2}
