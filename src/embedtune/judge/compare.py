"""Is B better than A? Paired differences with intervals, because both were scored on the same items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """B minus A with its 95 % interval; `items` and the `groups` they were resampled in."""

    value: float
    low: float
    high: float
    items: int
    groups: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def ratio_difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray, seed: int = 0) -> Difference:
    """Difference of two ratios of sums, such as the mean loss per masked token of two models on the same rows.

    `a`, `b` (n, 2): numerator and denominator per item; `groups` (n,): items that belong together (lines of one
    document) are drawn together, so the interval does not pretend that neighbours are independent. Percentile
    bootstrap over groups, 2,000 draws. Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape or a.shape[0] != len(groups):
        raise ValueError(f"items differ: {a.shape}, {b.shape}, {groups.shape}")
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    sums = np.zeros((count, 4))
    np.add.at(sums, place, np.hstack([a, b]))
    generator = np.random.default_rng(seed)
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        total = generator.multinomial(count, np.full(count, 1 / count)) @ sums
        drawn[draw] = total[2] / total[3] - total[0] / total[1]
    total = sums.sum(0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(float(total[2] / total[3] - total[0] / total[1]), float(low), float(high), len(groups), count)
