"""Ids as hashes of 16 bytes, so that their texts need not stay in memory; two are taken for one once in 2^128 pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

HASH = np.dtype("S16")


def hashes(ids: Iterable[str]) -> np.ndarray:
    """The hash of each id: (n,) of 16 bytes."""
    found = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest() for key in ids]
    return np.array(found, HASH)


class Known:
    """A set of ids that grows.

    Its hashes lie in sorted runs, each longer than the next: a new one takes in those before it that are not longer,
    so there are few, and none is sorted often.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def among(self, ids: Sequence[str]) -> set[str]:
        """Which of these are in it."""
        asked = hashes(ids)
        there = np.zeros(len(asked), bool)
        for run in self.runs:
            there |= run[np.minimum(np.searchsorted(run, asked), len(run) - 1)] == asked
        return {ids[place] for place in np.flatnonzero(there).tolist()}

    def add(self, ids: Sequence[str]) -> None:
        """Put some into it."""
        run = np.sort(hashes(ids))
        while self.runs and len(self.runs[-1]) <= len(run):
            run = np.concatenate([self.runs.pop(), run])
            run.sort(kind="stable")  # of two sorted runs that is one merge
        if len(run):
            self.runs.append(run)


class Places:
    """The rows of ids that do not change: of all ids (n,), a block at a time, those that are `live`, (n,) bool."""

    def __init__(self, ids: Iterable[Sequence[str]], live: np.ndarray) -> None:
        found, start = np.empty(len(live), HASH), 0
        for block in ids:
            found[start : start + len(block)] = hashes(block)
            start += len(block)
        order = np.argsort(found, kind="stable")
        self.rows = order[live[order]]
        self.hashes = found[self.rows]

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, (n,) int64; -1 where it is not there."""
        if not len(self.rows):
            return np.full(len(ids), -1, np.int64)
        asked = hashes(ids)
        place = np.minimum(np.searchsorted(self.hashes, asked), len(self.rows) - 1)
        return np.where(self.hashes[place] == asked, self.rows[place], -1)

    def among(self, ids: Sequence[str]) -> set[str]:
        """Which of these are there."""
        return {ids[place] for place in np.flatnonzero(self.rows_of(ids) >= 0).tolist()}
