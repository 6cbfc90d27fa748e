"""Affine maps after which no linear read-out of a concept is left, as functions of the moments (arXiv 2306.03819).

Everything happens in whitened coordinates. There the columns of A span how the vectors move with the concept, and
I - A (N'A)^-1 N' removes it whatever N is: N = A changes the vectors least (LEACE); with N = A without what it shares
with the span of another covariance B, that of B stays as it is (SPLINCE, arXiv 2506.10703).
Tolerances are on correlations, so neither the scale of a concept nor the rarity of a class changes a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from embedtune.errors import UserError
from embedtune.refine.affine import Affine
from embedtune.refine.statistics import FLOAT32, Statistics, solve

Method = Literal["leace", "orthogonal", "inlp", "direction"]
RHO = 1e-8  # a canonical correlation below it is rounding
COLLINEAR = 1e-10  # of the largest eigenvalue of the concept's correlation matrix
ANGLE = 1e-6  # squared sine of the angle between what goes and what is to stay


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates in which the vectors have variance one: w = forward (x - mean), x = mean + back w."""

    mean: np.ndarray  # (d,)
    forward: np.ndarray  # (r, d)
    back: np.ndarray  # (d, r)
    shrinkage: float  # how far the correlations were drawn to zero; 0 where there are rows enough

    def affine(self, inner: np.ndarray, strength: float = 1.0) -> Affine:
        """The map back (I - strength (I - inner)) forward about the mean; inner (r, r)."""
        weight = self.back @ ((1 - strength) * self.forward + strength * (inner @ self.forward))
        return Affine(weight, self.mean - weight @ self.mean)


def whitening(statistics: Statistics, *, shrink: bool = True) -> Whitening:
    """Whitened coordinates of the directions that live; the others have no coordinate, so they go to their mean.

    Dead are coordinates with less than 1e-6 of the median spread (a LayerNorm gain near zero), and eigen-directions of
    the correlation matrix below 2^-23 d lambda_max: in floating point both still carry what was divided out.
    With fewer rows than 2 d the correlations are shrunk towards zero, by the optimum for a normal law (OAS, arXiv
    0907.4698); with fewer than d nothing but a dead coordinate can be told from one that was not seen yet.
    Without `shrink` they are the rows' own: that is for measuring these rows, and makes no map for others.
    """
    if not statistics.weight:
        raise UserError("there are no rows")
    spread = np.sqrt(np.diag(statistics.S_xx) / statistics.weight)
    alive = spread > 1e-6 * np.median(spread)
    if not alive.any():
        raise UserError("all vectors are the same: there is nothing to erase from")
    spread, d = spread[alive], int(alive.sum())
    correlation = statistics.S_xx[np.ix_(alive, alive)] / statistics.weight / np.outer(spread, spread)
    values, vectors = np.linalg.eigh(correlation)
    shrinkage = _shrinkage(values, statistics.n_effective) if shrink and statistics.n_effective < 2 * d else 0.0
    if not shrink or statistics.n_effective > d:
        kept = values > values[-1] * d * FLOAT32
        values, vectors = values[kept], vectors[:, kept]
    root = np.sqrt((1 - shrinkage) * np.maximum(values, 0) + shrinkage)
    forward, back = np.zeros((len(root), len(alive))), np.zeros((len(alive), len(root)))
    forward[:, alive] = vectors.T / root[:, None] / spread
    back[alive] = spread[:, None] * vectors * root
    return Whitening(statistics.mean_x, forward, back, shrinkage)


def _shrinkage(values: np.ndarray, n: float) -> float:
    """The weight of the identity, in [0, 1], from the eigenvalues (d,) of a correlation matrix of n rows."""
    d, square = len(values), float(values @ values)
    excess = (n + 1 - 2 / d) * (square - values.sum() ** 2 / d)
    wanted = (1 - 2 / d) * square + values.sum() ** 2
    return float(np.clip(wanted / excess, 0, 1)) if excess > 0 else 1.0


def whitened_concept(statistics: Statistics, columns: slice = slice(None)) -> np.ndarray:
    """The matrix (k, q) that makes the concept's columns uncorrelated with variance one; the rest of it is zero.

    Constant columns, and combinations that collinear columns leave without variance, get none of the q.
    """
    k = len(statistics.mean_z)
    chosen = np.arange(k)[columns]
    spread = np.sqrt(np.diag(statistics.S_zz) / max(statistics.weight, 1e-300))[chosen]
    varies = spread > 1e-12 * np.abs(statistics.mean_z[chosen])
    chosen, spread = chosen[varies], spread[varies]
    if not len(chosen):
        return np.zeros((k, 0))
    correlation = statistics.S_zz[np.ix_(chosen, chosen)] / statistics.weight / np.outer(spread, spread)
    values, vectors = np.linalg.eigh(correlation)
    kept = values > COLLINEAR * values[-1]
    out = np.zeros((k, int(kept.sum())))
    out[chosen] = vectors[:, kept] / spread[:, None] / np.sqrt(values[kept])
    return out


def canonical_correlations(statistics: Statistics, columns: slice = slice(None)) -> np.ndarray:
    """How well each independent part of the concept can be read out linearly: correlations in [0, 1], largest first."""
    moved = _moved(statistics, whitening(statistics, shrink=False), columns)
    return np.minimum(np.linalg.svd(moved, compute_uv=False), 1) if moved.size else np.zeros(0)  # 1 + rounding


def _moved(statistics: Statistics, white: Whitening, columns: slice) -> np.ndarray:
    """Covariance (r, q) of the whitened vectors with the whitened concept."""
    return white.forward @ statistics.S_xz @ whitened_concept(statistics, columns) / statistics.weight


def removal(moved: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """I - A (N'A)^-1 N' with A = span(moved (r, q)), N = A without its part in span(kept (r, p)).

    Raises UserError where the two spans (nearly) share a direction: then it cannot both go and stay.
    """
    A, B = _span(moved), _span(kept)
    check_room(A.shape[1], len(A))
    if not A.shape[1]:
        return np.eye(len(A))
    N = A - B @ (B.T @ A)
    apart = N.T @ A
    if np.linalg.eigvalsh((apart + apart.T) / 2)[0] < ANGLE:
        raise UserError(
            "the vectors move in one direction with the concept and with what is to be preserved: it cannot both go "
            "and stay",
            fix="preserve another column, or none",
        )
    return np.eye(len(A)) - A @ np.linalg.solve(apart, N.T)


def check_room(rank: int, live: int) -> None:
    """A UserError where the concept takes all dimensions, so that all vectors would become the same."""
    if rank >= live > 0:
        raise UserError(
            f"the concept moves the vectors in all of their {live:,} dimensions: nothing would be left of them",
            fix="erase fewer concepts or classes, or a scalar instead of a function",
        )


def _span(moved: np.ndarray) -> np.ndarray:
    left, values, _ = np.linalg.svd(moved, full_matrices=False)
    return left[:, values > RHO]


def leace(statistics: Statistics, *, keep: int = 0, strength: float = 1.0) -> Affine:
    """The map that changes the vectors least and leaves no covariance with the concept.

    The last `keep` columns of z are not erased: the covariance with them stays exactly as it is (SPLINCE).
    `strength` t goes that part of the way: covariances shrink to 1 - t of what they were.
    """
    _check(strength)
    white, split = whitening(statistics), len(statistics.mean_z) - keep
    moved, kept = (_moved(statistics, white, part) for part in (slice(split), slice(split, None)))
    return white.affine(removal(moved, kept), strength)


def orthogonal(statistics: Statistics, *, strength: float = 1.0) -> Affine:
    """Projects out how the vectors move with the concept, Cov(x, z): exact too, but it changes more than LEACE."""
    _check(strength)
    white = whitening(statistics)
    basis = np.linalg.qr(white.back @ _span(_moved(statistics, white, slice(None))))[0]
    return _projected(white, basis, strength)


def inlp(statistics: Statistics, *, rounds: int = 20, strength: float = 1.0) -> Affine:
    """Projects out the regression direction, fits another one on what is left, and so on (arXiv 2004.07667).

    Kept to compare with: it takes many rounds, each of which damages the vectors, and is never exact.
    """
    _check(strength)
    concept = whitened_concept(statistics)
    basis = np.zeros((len(statistics.mean_x), 0))
    for _ in range(rounds):
        left = np.eye(len(basis)) - basis @ basis.T
        S_xx = left @ statistics.S_xx @ left
        now = replace(statistics, S_xx=(S_xx + S_xx.T) / 2, S_xz=left @ statistics.S_xz @ concept)
        found = left @ solve(now)[0]
        read = np.einsum("ij,ij->j", found, now.S_xz) / statistics.weight  # R2 of each part of the concept
        if not (read > RHO**2).any():
            break
        found = found[:, read > RHO**2]
        basis = np.hstack([basis, _span(found / np.linalg.norm(found, axis=0))])
    return _projected(whitening(statistics), basis, strength)


def direction(statistics: Statistics, *, strength: float = 1.0) -> Affine:
    """Projects out the one regression direction of each column: the naive method, which leaves most of the concept."""
    return inlp(statistics, rounds=1, strength=strength)


METHODS: dict[str, Callable[..., Affine]] = {m: globals()[m] for m in get_args(Method)}


def _projected(white: Whitening, basis: np.ndarray, strength: float) -> Affine:
    """Away with the orthonormal `basis` (d, q) of the original coordinates, and with what is dead."""
    live = white.back @ white.forward
    weight = live - strength * basis @ (basis.T @ live)
    return Affine(weight, white.mean - weight @ white.mean)


def _check(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UserError(f"must lie between 0 and 1, not {strength:g}", where="--strength")
