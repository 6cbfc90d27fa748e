"""A measure with its interval and its bootstrap draws, by which two models are compared on the same resamples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedtune.errors import UserError
from embedtune.judge.compare import tails

DRAWS = 2000
ALPHA = 0.05
# From how often each item counts, (B, n), to the measure on each resample, (B,).
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Score:
    """A measure of one model; `neutral` is its value where there is no bias, `units` what was resampled."""

    name: str
    value: float
    low: float
    high: float
    neutral: float
    items: int
    units: int
    draws: np.ndarray = field(repr=False)  # (B,) the measure on resamples that are the same for every model
    p: float | None = None
    p_error: float = 0.0  # standard error of a p that was drawn; 0 where it is exact
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without the draws."""
        return {name: value for name, value in vars(self).items() if name != "draws"}


def score(
    name: str, statistic: Statistic, groups: Sequence[Hashable], neutral: float, *, seed: int = 0, draws: int = DRAWS
) -> Score:
    """A statistic of items with the expanded percentile interval (arXiv 1411.5279) of resampled `groups` (n,).

    Items of one group are drawn together. With equal seeds and groups the resamples are those of any other model.
    Raises UserError where there are fewer than two groups.
    """
    place, count = numbered(groups, name)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    drawn = statistic(times[:, place].astype(np.float64))
    value = float(statistic(np.ones((1, len(place))))[0])
    return Score(name, value, *percentiles(drawn, count), neutral, len(place), count, drawn)


def mean(name: str, values: np.ndarray, groups: Sequence[Hashable], neutral: float, *, seed: int = 0) -> Score:
    """`score` of the mean of values (n,)."""
    return score(name, lambda weights: weights @ values / weights.sum(1), groups, neutral, seed=seed)


def balanced(values: np.ndarray, sides: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of the two means (B,) of values (n,) on side 0 and side 1, items counting `weights` (B, n) times."""
    parts = [weights[:, sides == side] for side in (0, 1)]
    sums = [part @ values[sides == side] for part, side in zip(parts, (0, 1))]
    means = [total / np.maximum(part.sum(1), 1) for total, part in zip(sums, parts)]
    return (means[0] + means[1]) / 2


def share(name: str, hits: np.ndarray, neutral: float = 0.5, *, seed: int = 0) -> Score:
    """The share of independent items (n,) bool that hit, with Wilson's interval."""
    found = mean(name, hits.astype(np.float64), range(len(hits)), neutral, seed=seed)
    low, high = wilson(int(hits.sum()), len(hits))
    return Score(name, found.value, low, high, neutral, len(hits), len(hits), found.draws)


def wilson(hits: int, many: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(hits, many).proportion_ci(1 - ALPHA, method="wilson")
    return float(found.low), float(found.high)


def difference(a: Score, b: Score) -> tuple[float, float, float]:
    """`b` minus `a` with its 95 % interval, on the same resamples. Raises ValueError for scores of other items."""
    if (a.name, a.items, a.units) != (b.name, b.items, b.units) or len(a.draws) != len(b.draws):
        raise ValueError(f"{a.name} of {a.items} items and {b.name} of {b.items}")
    return b.value - a.value, *percentiles(b.draws - a.draws, a.units)


def percentiles(drawn: np.ndarray, units: int) -> tuple[float, float]:
    """The quantiles of draws that cover a normal mean of `units` values as Student's t does."""
    low, high = np.quantile(drawn, tails(units))
    return float(low), float(high)


def numbered(groups: Sequence[Hashable], name: str) -> tuple[np.ndarray, int]:
    """The number of each item's group (n,), in order of appearance, and how many groups there are."""
    number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    if len(number) < 2:
        raise UserError(f"{len(groups):,} items in {len(number)} groups: an interval needs at least two", where=name)
    return np.array([number[group] for group in groups]), len(number)
