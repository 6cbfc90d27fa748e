"""Exact nearest neighbours by inner product, block by block: arrays, memory maps and `Unit` views of them.

A float32 matrix product decides who can be among the nearest; those few are scored again in float64 and rounded to
float32. So equal vectors have equal scores wherever they stand, and neither the size of a block nor the number of
threads changes a ranking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from embedtune.errors import UserError

BLOCK = 16_384  # corpus rows at a time
SCORES = 1 << 24  # scores held at once: 64 MiB
NUMBERS = 1 << 21  # of float64 held at once where candidates are scored again
UNIT_ROUNDOFF = 2.0**-24


class Rows(Protocol):
    """A matrix that is read by slices and row numbers: an array, a memory map, a `Unit`, a `Scratch`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Some of its rows."""


@dataclass(frozen=True, eq=False)
class Scratch:
    """A matrix (N, D) of float32 in a file that is open, read where something is asked for.

    It is not mapped: the pages of a map that is read as a whole are memory like any other.
    """

    file: IO[bytes]
    shape: tuple[int, ...]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            first, last, step = rows.indices(self.shape[0])
            assert step == 1
            return self._run(first, max(first, last))
        rows = np.asarray(rows)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # of numbers that follow each other
        return np.concatenate([self._run(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)] or [self[:0]])

    def _run(self, first: int, last: int) -> np.ndarray:
        width = 4 * self.shape[1]
        self.file.seek(first * width)
        return np.frombuffer(self.file.read((last - first) * width), np.float32).reshape(-1, self.shape[1])


@dataclass(frozen=True, eq=False)
class Cut:
    """The first `dim` numbers of each row, as they are."""

    vectors: Rows
    dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, dim)."""
        return self.vectors.shape[0], min(self.dim or self.vectors.shape[1], self.vectors.shape[1])

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self.vectors[rows], np.float32)[..., : self.dim]


@dataclass(frozen=True, eq=False)
class Unit:
    """The first `dim` numbers of each row, scaled to length one as the row is read; a zero row stays zero."""

    vectors: Rows
    dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, dim)."""
        return Cut(self.vectors, self.dim).shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        return unit(Cut(self.vectors, self.dim)[rows])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, D) of length one, of the type that they had; a zero row stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    out: np.ndarray = vectors / np.where(length > 0, length, 1)
    return out


def top_k(
    queries: Rows, corpus: Rows, k: int, *, prefer: np.ndarray | None = None, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `corpus` (N, D) with the largest inner product, for each row of `queries` (Q, D), best first.

    Returns scores (Q, k) float32 and row numbers (Q, k) int64, where k is at most N. Of equal scores the one with
    the smaller `prefer` (N,) comes first, then the smaller row number. The corpus is read once; memory is the
    answer, `block` corpus rows and 2^24 scores. Raises UserError for a vector that is not finite.
    """
    count, wanted = queries.shape[0], min(k, corpus.shape[0])
    scores = np.full((count, wanted), -np.inf, np.float32)
    found = np.zeros((count, wanted), np.int64)
    if wanted == 0 or count == 0:
        return scores, found
    block = max(block, wanted)
    step = max(1, SCORES // block)
    for start, part, largest in _blocks(corpus, block, "corpus"):
        for first, asked, _ in _blocks(queries, step, "query"):
            here = slice(first, first + len(asked))
            slack = _slack(asked, largest)
            product = asked @ part.T
            floor = scores[here, -1] - slack
            if not np.isfinite(floor).any() and len(part) > wanted:
                floor = np.partition(product, len(part) - wanted, axis=1)[:, len(part) - wanted] - 2 * slack
            rows, columns = np.nonzero(product >= floor[:, None])
            if len(rows):
                exact = _dots(asked, part, rows, columns)
                _merge(scores[here], found[here], rows, exact, columns + start, prefer)
    return scores, found


def ranks(
    queries: Rows, corpus: Rows, pairs: np.ndarray, *, prefer: np.ndarray | None = None, block: int = BLOCK
) -> np.ndarray:
    """The place (from 1) of a corpus row in the whole ranking of a query, for each (query, row) of `pairs` (P, 2).

    The ranking is that of `top_k` with k = N, but nothing is sorted: the rows that come before are counted.
    """
    order = np.argsort(pairs[:, 0], kind="stable")
    query, target = pairs[order, 0], pairs[order, 1]
    before = np.zeros(len(pairs), np.int64)
    own = np.zeros(len(pairs), np.float32)
    step = max(1, SCORES // (4 * block))
    for first in range(0, len(pairs), step):
        here = slice(first, first + step)
        own[here] = _dots(queries[query[here]], _floats(corpus[target[here]]))
    for start, part, largest in _blocks(corpus, block, "corpus"):
        for first in range(0, len(pairs), step):
            here = slice(first, first + step)
            asked, place = np.unique(query[here], return_inverse=True)
            vectors = _floats(queries[asked])
            ahead = (vectors @ part.T)[place]
            ahead -= own[here, None]
            slack = _slack(vectors, largest)[place, None]
            before[here] += (ahead > slack).sum(1)
            near, column = np.nonzero(np.abs(ahead, out=ahead) <= slack)
            exact, mine = _dots(vectors, part, place[near], column), own[here][near]
            first_of_equals = _earlier(column + start, target[here][near], prefer)
            wins = (exact > mine) | ((exact == mine) & first_of_equals)
            before[here] += np.bincount(near[wins], minlength=len(place))
    out = np.empty(len(pairs), np.int64)
    out[order] = before + 1
    return out


def _floats(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows, dtype=np.float32)


def _blocks(matrix: Rows, step: int, what: str) -> Iterator[tuple[int, np.ndarray, float]]:
    """(first row, rows as float32, largest length of a row) for each run of `step` rows."""
    for start in range(0, matrix.shape[0], step):
        part = _floats(matrix[start : start + step])
        lengths = np.linalg.norm(part, axis=1)
        if not np.isfinite(lengths).all():
            row = start + int(np.argmin(np.isfinite(lengths)))
            raise UserError(f"the vector of row {row:,} is not finite", where=what, fix="the model is damaged")
        yield start, part, float(lengths.max())


def _slack(queries: np.ndarray, largest: float) -> np.ndarray:
    """How far a float32 product can be from the true one: (B,), the bound D u |q||c| of any order of summation."""
    size = queries.shape[1] + 2
    return (size * UNIT_ROUNDOFF * largest * np.linalg.norm(queries, axis=1)).astype(np.float32)


def _dots(a: np.ndarray, b: np.ndarray, rows: Any = slice(None), columns: Any = slice(None)) -> np.ndarray:
    """Inner products of a[rows] with b[columns], pair by pair, in float64, rounded to float32: (M,)."""
    whole = isinstance(rows, slice)
    count = len(a) if whole else len(rows)
    out = np.empty(count, np.float32)
    step = max(1, NUMBERS // max(1, a.shape[1]))
    for first in range(0, count, step):
        here = slice(first, first + step)
        left = (a[here] if whole else a[rows[here]]).astype(np.float64)
        right = (b[here] if whole else b[columns[here]]).astype(np.float64)
        out[here] = np.einsum("md,md->m", left, right)
    return out


def _earlier(one: np.ndarray, other: np.ndarray, prefer: np.ndarray | None) -> np.ndarray:
    """Whether corpus rows `one` come before `other` at equal scores."""
    if prefer is None:
        return one < other
    return (prefer[one] < prefer[other]) | ((prefer[one] == prefer[other]) & (one < other))


def _merge(
    scores: np.ndarray, found: np.ndarray, rows: np.ndarray, new: np.ndarray, index: np.ndarray, prefer: Any
) -> None:
    """Put candidates (rows ascending, index ascending within a row) among the best so far (B, k), in place."""
    k = scores.shape[1]
    touched, place = np.unique(rows, return_inverse=True)
    group = np.concatenate([np.repeat(np.arange(len(touched)), k), place])
    value = np.concatenate([scores[touched].ravel(), new])
    index = np.concatenate([found[touched].ravel(), index])
    # A stable sort: what was there before has smaller row numbers, so equals keep the order of the corpus.
    keys = (-value, group) if prefer is None else (prefer[index], -value, group)
    order = np.lexsort(keys)
    sizes = np.bincount(group, minlength=len(touched))
    position = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = order[position < k]
    scores[touched] = value[kept].reshape(-1, k)
    found[touched] = index[kept].reshape(-1, k)
