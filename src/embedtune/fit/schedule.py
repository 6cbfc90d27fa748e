"""Learning-rate schedules: the factor on the peak rate as a function of the step."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total: int) -> int:
    """Below 1 a fraction of the steps, else a number of steps; at most all of them."""
    return min(total, math.ceil(warmup * total) if warmup < 1 else int(warmup))


def factor(step: int, total: int, schedule: str, warmup: float) -> float:
    """The factor at `step` (0-based) of `total`; rises linearly over the warm-up, then follows `schedule`.

    `wsd` (warm-up, stable, decay) falls linearly over the last tenth, arXiv 2404.06395.
    """
    rise = warmup_steps(warmup, total)
    if step < rise:
        return (step + 1) / rise
    left = (total - step) / max(1, total - rise)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    if schedule == "wsd":
        return min(1.0, (total - step) / max(1.0, 0.1 * total))
    return 1.0
