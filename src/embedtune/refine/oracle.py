"""Erasure that is told the concept's value: for what is known when a text is embedded, its length or its source.

A category parts the texts into cells, a number into the soft cells of a spline. In each cell the vectors are given the
mean and the covariance that all cells have together: x -> mean + A (x - mean of the cell). There
A = C^-1/2 (C^1/2 P C^1/2)^1/2 C^-1/2 carries the cell's covariance C into the common one, P, and moves the vectors
least, every coordinate in its standard deviations (optimal transport between normal laws, Olkin and Pukelsheim 1982).
Normalising undoes a part of it, so rounds of means follow. No affine map can do this, so it cannot be a module of a
stock model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.refine.concepts import Encoding
from embedtune.refine.eraser import whitened_concept
from embedtune.refine.statistics import accumulate

ROUNDS = (2, 2)  # first of means and covariances, then of means alone
SMALLEST = 1e-10  # of the largest variance of a covariance: below it a direction is rounding
Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # (x (m, d), cells (m, K)), from the start at each call


def cells(encoding: Encoding, values: Iterable[Any]) -> np.ndarray:
    """How much each value belongs to each cell, (n, K): at least zero, one in sum.

    Raises UserError for a value that is missing, or not of the encoding's kind.
    """
    z = encoding(values)
    if len(bad := np.flatnonzero(~np.isfinite(z).all(axis=1))):
        what = f"{len(bad):,} values are missing: the oracle has to be told all of them"
        raise UserError(what, where=f"concept {encoding.name!r}, value {bad[0]:,}")
    return with_first(z)


def with_first(z: np.ndarray) -> np.ndarray:
    """All cells (n, K) from the columns (n, K - 1) of an encoding: the first cell is what the others leave of one."""
    first = 1 - z.sum(axis=1)
    return np.column_stack([np.where(first > 1e-12, first, 0.0), z])


@dataclass(frozen=True, eq=False)
class Round:
    """One map of each cell: x -> mean + sum_k w_k maps_k (x - sum_k w_k centres_k); without maps only means move."""

    mean: np.ndarray  # (d,)
    centres: np.ndarray  # (K, d)
    maps: np.ndarray | None  # (K, d, d): rest @ map

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Vectors (n, d) in cells w (n, K) -> (n, d)."""
        rest = x - w @ self.centres
        if self.maps is None:
            return self.mean + rest
        out = np.tile(self.mean, (len(x), 1))
        for weight, each in zip(w.T, self.maps, strict=True):
            rows = np.flatnonzero(weight)  # a spline has four cells at a time
            out[rows] += weight[rows, None] * (rest[rows] @ each)
        return out


@dataclass(frozen=True, eq=False)
class Transport:
    """The rounds, one after the other; `normalise`: vectors of norm one come out of each."""

    alive: np.ndarray  # (d,) bool: the others hold nothing but rounding, and become zero
    rounds: tuple[Round, ...]
    normalise: bool

    def __call__(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Vectors (n, d) of any float type in cells w (n, K) -> erased ones, float64."""
        out = np.asarray(x, np.float64) * self.alive
        for each in self.rounds:
            out = each(out, w) * self.alive  # a tree would find what rounding leaves there, at any scale
            out = unit(out) if self.normalise else out
        return out


def fit_transport(chunks: Chunks, normalise: bool, rounds: tuple[int, int] = ROUNDS) -> Transport:
    """Fit on a stream of (x, cells) that `chunks()` starts anew for each pass.

    Covariances of all rounds would undo the noise of these very rows, and mark fresh ones: so means come last.
    Without normalisation the first round is exact, and the only one.
    """
    statistics = accumulate(chunks())
    spread = np.sqrt(np.diag(statistics.S_xx))
    made = Transport(spread > 1e-6 * np.median(spread), (), normalise)
    for k in range(sum(rounds) if normalise else 1):
        made = Transport(made.alive, (*made.rounds, _fit_round(made, chunks, covariances=k < rounds[0])), normalise)
    return made


def _fit_round(made: Transport, chunks: Chunks, covariances: bool) -> Round:
    """The next round, from the vectors as the others leave them."""

    def now() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((made(x, w), w) for x, w in chunks())

    # The cells add up to one, so the first is what the others leave.
    first = accumulate((x, w[:, 1:]) for x, w in now())
    concept = whitened_concept(first)
    slopes = concept @ concept.T @ first.S_xz.T / first.weight
    start = first.mean_x - first.mean_z @ slopes
    centres = np.vstack([start, start + slopes])
    if not covariances:
        return Round(first.mean_x, centres, None)
    d, K = len(start), len(centres)
    squares, sums, sums2 = np.zeros((K, d, d)), np.zeros(K), np.zeros(K)
    for x, w in now():
        rest = x - w @ centres
        for k in range(K):
            rows = np.flatnonzero(w[:, k])
            squares[k] += (rest[rows] * w[rows, k, None]).T @ rest[rows]
        sums, sums2 = sums + w.sum(axis=0), sums2 + (w**2).sum(axis=0)
    common = squares.sum(axis=0) / sums.sum()
    scale = np.sqrt(np.diag(common))
    scale = np.where(made.alive, scale, 1.0)
    metric = np.outer(scale, scale)
    few = sums**2 / np.maximum(sums2, 1e-300)
    maps = np.stack([_carry(squares[k] / metric, sums[k], few[k], common / metric) for k in range(K)])
    maps *= scale / scale[:, None]
    return Round(first.mean_x, centres, maps)


def _carry(square: np.ndarray, total: float, n: float, common: np.ndarray) -> np.ndarray:
    """The map from a cell's covariance to the common one; that of a cell of few rows n is drawn to it by d / (d + n).

    The covariance of few rows is mostly noise, and undoing noise would mark the cell.
    """
    if total <= 0:
        return np.eye(len(common))
    own = len(common) / (len(common) + n)
    covariance = (1 - own) * square / total + own * common
    root, back = _power(covariance, 0.5), _power(covariance, -0.5)
    return back @ _power(root @ common @ root, 0.5) @ back


def _power(covariance: np.ndarray, p: float) -> np.ndarray:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    values = np.maximum(values, SMALLEST * max(values[-1], 1e-300))
    out: np.ndarray = (vectors * values**p) @ vectors.T
    return out
