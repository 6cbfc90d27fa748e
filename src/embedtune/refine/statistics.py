"""Means and cross-products of a stream of vectors: exact in float64, mergeable, weighted, flat in memory.

Everything linear that `refine` does (read-outs, erasers, whitening, PCA) is a function of these moments, so
one pass over the embeddings is enough, and shards, workers and resumed runs are put together with `a + b`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedtune import files
from embedtune.errors import UserError, short_list

BLOCK = 4096  # rows cast at once: big enough for the GEMM's full speed, small enough for the cache
FLOAT32 = 2.0**-23  # the rounding of the arithmetic that embeddings come from
FORMAT = "embedtune.statistics.1"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of x (d,) and z (k,) over `n` rows with weights w; S_ab = sum w (a - mean_a)(b - mean_b)'."""

    n: int
    weight: float  # sum w
    weight2: float  # sum w^2
    mean_x: np.ndarray  # (d,)
    mean_z: np.ndarray  # (k,)
    S_xx: np.ndarray  # (d, d)
    S_xz: np.ndarray  # (d, k)
    S_zz: np.ndarray  # (k, k)

    @classmethod
    def of(
        cls, x: np.ndarray, z: np.ndarray, weights: np.ndarray | None = None, *, first_row: int = 0,
        origin: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Statistics:  # fmt: skip
        """Moments of x (n, d) and z (n,) or (n, k), any float type; x may be a memory map of any size.

        `first_row` is the number of the first row in the user's data, for messages. `origin` (d,) and (k,) is taken
        from every row, and so from the means; the other moments do not depend on it. Raises UserError for
        shapes that do not agree, NaN or infinite values (naming the rows), negative or non-finite weights.
        """
        x, z = np.asarray(x), np.asarray(z)
        z = z[:, None] if z.ndim == 1 else z
        if x.ndim != 2 or z.ndim != 2 or len(x) != len(z):
            raise UserError(f"vectors must be (n, d) and targets (n, k), found {x.shape} and {z.shape}")
        here = x.shape[1], z.shape[1]
        if origin is not None and (there := (len(origin[0]), len(origin[1]))) != here:
            raise UserError(f"statistics of {there} and {here} (d, k) cannot be merged")
        w = _checked_weights(weights, len(x), first_row)
        total = cls.empty(x.shape[1], z.shape[1])
        for start in range(0, len(x), BLOCK):
            rows = slice(start, start + BLOCK)
            total = total + _block(x[rows], z[rows], None if w is None else w[rows], first_row + start, origin)
        return total

    @classmethod
    def empty(cls, d: int, k: int) -> Statistics:
        """The neutral element of `+`."""
        zeros = np.zeros
        return cls(0, 0.0, 0.0, zeros(d), zeros(k), zeros((d, d)), zeros((d, k)), zeros((k, k)))

    def __add__(self, other: Statistics) -> Statistics:
        """Moments of both sets of rows together: S = S_a + S_b + (W_a W_b / W) delta delta'."""
        if self.S_xz.shape != other.S_xz.shape:
            raise UserError(f"statistics of {self.S_xz.shape} and {other.S_xz.shape} (d, k) cannot be merged")
        if not self.weight or not other.weight:  # a side without weight moves no moment; its rows are counted
            heavy = self if self.weight else other
            return Statistics(self.n + other.n, *[getattr(heavy, name) for name in _FIELDS[1:]])
        weight = self.weight + other.weight
        share = other.weight / weight
        dx, dz = other.mean_x - self.mean_x, other.mean_z - self.mean_z
        pull = self.weight * share
        return Statistics(
            self.n + other.n,
            weight,
            self.weight2 + other.weight2,
            self.mean_x + share * dx,
            self.mean_z + share * dz,
            _plus_outer(self.S_xx, other.S_xx, pull, dx, dx),
            _plus_outer(self.S_xz, other.S_xz, pull, dx, dz),
            _plus_outer(self.S_zz, other.S_zz, pull, dz, dz),
        )

    @property
    def n_effective(self) -> float:
        """Kish's effective number of rows, (sum w)^2 / sum w^2."""
        return self.weight**2 / self.weight2 if self.weight2 else 0.0

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        from safetensors.numpy import save

        arrays = {name: np.atleast_1d(np.asarray(getattr(self, name))) for name in _FIELDS}
        files.write_bytes(Path(path), save(arrays, metadata={"format": FORMAT}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote; a missing, damaged or foreign file is a UserError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(Path(path).read_bytes())
            n, weight, weight2 = (arrays[name].item() for name in _FIELDS[:3])
            return cls(int(n), weight, weight2, *[arrays[name] for name in _FIELDS[3:]])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            fix = "write them again, by Statistics.save"
            raise UserError(f"cannot be read as statistics: {error}", where=str(path), fix=fix) from error


_FIELDS = tuple(Statistics.__dataclass_fields__)


def accumulate(chunks: Iterable[tuple[np.ndarray, ...]]) -> Statistics:
    """Moments of a stream of (x, z) or (x, z, weights) chunks. Raises UserError where there is no row."""
    stream = iter(chunks)
    first = next(stream, None)
    if first is None:
        raise UserError("there are no rows")
    total = Statistics.of(*first)
    # Around the first mean: else each sum of means far from zero rounds at their size, not at that of the spread.
    origin = total.mean_x, total.mean_z
    total = replace(total, mean_x=np.zeros_like(origin[0]), mean_z=np.zeros_like(origin[1]))
    for chunk in stream:
        total = total + Statistics.of(*chunk, first_row=total.n, origin=origin)
    if not total.n:
        raise UserError("there are no rows")
    return replace(total, mean_x=total.mean_x + origin[0], mean_z=total.mean_z + origin[1])


def solve(statistics: Statistics) -> tuple[np.ndarray, int]:
    """Regression weights of z on x, (d, k), and the number of live dimensions.

    Solved on the correlation matrix, so that the scale of a coordinate does not matter. Coordinates whose
    spread is below 1e-6 of the median (a LayerNorm gain near zero) and eigen-directions below 2^-23 d
    lambda_max are rounding noise that predicts well and means nothing: they get no weight.
    """
    spread = np.sqrt(np.diag(statistics.S_xx))
    alive = spread > 1e-6 * np.median(spread)
    weights = np.zeros_like(statistics.S_xz)
    if not alive.any():
        return weights, 0
    spread = spread[alive]
    values, vectors = np.linalg.eigh(statistics.S_xx[np.ix_(alive, alive)] / np.outer(spread, spread))
    kept = values > values[-1] * len(spread) * FLOAT32
    basis = vectors[:, kept] / spread[:, None]
    weights[alive] = basis @ ((basis.T @ statistics.S_xz[alive]) / values[kept, None])
    return weights, int(kept.sum())


def _block(
    x: np.ndarray, z: np.ndarray, w: np.ndarray | None, first_row: int, origin: tuple[np.ndarray, np.ndarray] | None
) -> Statistics:
    """Moments of one block around `origin`: cast first, centre on the block's mean, then multiply."""
    x, z = x.astype(np.float64), z.astype(np.float64)
    if origin is not None:
        x -= origin[0]
        z -= origin[1]
    ones = np.ones(len(x)) if w is None else w
    weight = float(ones.sum())
    if not weight:
        nothing = Statistics.empty(x.shape[1], z.shape[1])
        return Statistics(len(x), *[getattr(nothing, name) for name in _FIELDS[1:]])
    # ones @ x is both the mean and the check for NaN and infinity: either one survives a sum.
    with np.errstate(over="ignore", invalid="ignore"):
        mean_x, mean_z = ones @ x / weight, ones @ z / weight
    if not (np.isfinite(mean_x).all() and np.isfinite(mean_z).all()):
        refuse_non_finite(np.hstack([x, z]), first_row)
        raise UserError(f"the values around row {first_row:,} are too large to be summed in float64")
    x -= mean_x
    z -= mean_z
    # A mean of 1e4 standard deviations is rounded by 1e-12 of them; what is left of it is taken out again.
    left_x, left_z = ones @ x / weight, ones @ z / weight
    if w is not None:
        root = np.sqrt(w)[:, None]
        x *= root
        z *= root
    return Statistics(
        len(x),
        weight,
        float(ones @ ones),
        mean_x + left_x,
        mean_z + left_z,
        _no_less_than_zero(x.T @ x - np.outer(weight * left_x, left_x)),  # X'X is dsyrk: symmetric to the bit
        x.T @ z - np.outer(weight * left_x, left_z),
        _no_less_than_zero(z.T @ z - np.outer(weight * left_z, left_z)),
    )


def _no_less_than_zero(moments: np.ndarray) -> np.ndarray:
    """Variances of columns without spread are rounded to a little below zero: their roots would be NaN."""
    np.fill_diagonal(moments, np.maximum(moments.diagonal(), 0))
    return moments


def _plus_outer(a: np.ndarray, b: np.ndarray, pull: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """a + b + pull u v', with no more than one temporary."""
    out = np.outer(u, v)
    out *= pull
    out += a
    out += b
    return out


def _checked_weights(weights: np.ndarray | None, n: int, first_row: int) -> np.ndarray | None:
    if weights is None:
        return None
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,):
        raise UserError(f"weights must be ({n},), found {w.shape}")
    if len(bad := np.flatnonzero(~(np.isfinite(w) & (w >= 0)))):
        rows = short_list((bad + first_row).tolist())
        raise UserError(f"{len(bad):,} weights are negative or not finite (rows {rows})")
    return w


def refuse_non_finite(x: np.ndarray, first_row: int = 0) -> None:
    """Raise UserError, naming the rows, where x (n, d) holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1)) + first_row
    if len(bad):
        raise UserError(
            f"{len(bad):,} rows hold NaN or infinite values",
            where=f"vectors, row {bad[0]:,}",
            details=[f"rows: {short_list(bad.tolist())}"],
            fix="look at the texts of these rows, and at the model: it was probably trained to NaN",
        )
