"""Order and noise as pure functions of a key: nothing to save, nothing to replay.

`permutation` is a keyed bijection of 0..n-1 that is evaluated at any positions on their own, so resuming at step
10^6 is index arithmetic. `uniform` is counter-based noise: the same key gives the same number on every rank, in
every micro-batch, before and after a resume.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def mix(values: Array) -> Array:
    """The finaliser of splitmix64: uint64 in, well-mixed uint64 out (a bijection)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*parts: Array | int) -> Array:
    """Hash a tuple of integers or broadcastable integer arrays to uint64."""
    with np.errstate(over="ignore"):
        state = np.zeros((1,), np.uint64)
        for part in parts:
            # Negative numbers wrap, so that any Python integer below 2^64 is a part.
            number = np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64)
            state = mix(state * np.uint64(0x9E3779B97F4A7C15) + number + np.uint64(0x632BE59BD9B4E019))
        return state


def uniform(keys: Array) -> Array:
    """uint64 keys to float64 numbers in [0, 1)."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(positions: Array, size: int, seed: int, epoch: int) -> Array:
    """Where a keyed permutation of 0..size-1 sends `positions` ((n,) int64), each in O(1).

    A four-round Feistel network over the next power of four, walked until it lands inside (cycle walking): below
    four rounds on average, no table, no state.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = [key(seed, epoch, number) for number in range(4)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for salt in rounds:
            left, right = right, left ^ (key(right, salt) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
