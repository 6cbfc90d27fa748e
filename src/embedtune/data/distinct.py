"""The distinct ones among more texts than memory holds: which they are first, then those that are wanted of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def distinct(texts: Iterable[str]) -> np.ndarray:
    """The numbers, from 0, of the texts that differ from all before them, ascending: (n,) int64.

    Two of N texts are taken for one where they have the same hash: with probability N^2 / 2^65.
    """
    hashes = np.fromiter(map(hash, texts), np.int64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = hashes[1:] != hashes[:-1]
    first: np.ndarray = order[new]
    first.sort()
    return first


def texts_at(texts: Iterable[str], numbers: np.ndarray) -> list[str]:
    """The texts with these numbers ((n,) int64), in the order of the numbers."""
    wanted = set(numbers.tolist())
    found = {number: text for number, text in enumerate(texts) if number in wanted}
    return [found[number] for number in numbers.tolist()]
