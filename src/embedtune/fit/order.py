"""Data order as a pure function of (seed, step): resuming at step 10^6 is index arithmetic, not replay."""

from __future__ import annotations

import numpy as np

from embedtune.keyed import permutation


def steps_per_epoch(size: int, batch: int) -> int:
    """Optimizer steps in one pass over `size` rows; the last batch may be smaller."""
    return -(-size // batch)


def batch_rows(step: int, batch: int, size: int, seed: int) -> tuple[int, np.ndarray]:
    """(epoch, row numbers (n,) int64) of optimizer step `step`; every row once an epoch, in a new order each time."""
    epoch, index = divmod(step, steps_per_epoch(size, batch))
    positions = np.arange(index * batch, min((index + 1) * batch, size))
    return epoch, permutation(positions, size, seed, epoch)
