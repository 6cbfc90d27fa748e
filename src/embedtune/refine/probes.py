"""What a linear probe, fitted on fresh rows, finds of a concept in vectors, and what that says of all rows.

Fresh means: not the rows an eraser was fitted on. On those it is perfect by construction; on others a new probe finds
about r / (1 + r) of the variance again, r = (d - 1) / n for an eraser fitted on n rows (`floor`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedtune.errors import UserError
from embedtune.refine.statistics import refuse_non_finite

DRAWS = 999  # permutations
ALPHA = 0.05
ASKED, FEWEST = 10, 2  # rows per dimension: asked for, and below which nothing is said
COLUMNS = 256  # right-hand sides in one product
SERIES = 200  # terms; from c = 50 on the last is below 1e-40
POINTS = 600  # of a sum over a smooth distribution
CONSTANT = 1e-12  # a spread below this part of the mean is rounding


@dataclass(frozen=True)
class Linear:
    """A column of a concept read linearly: R2 on the probe's own rows, and rho2, the best that any linear read-out has.

    `rho2` is Olkin and Pratt's unbiased estimate, `low` and `high` its 95 % interval, simultaneous over the columns.
    `bound` is the upper limit to quote: a draw of R2 that is lower than chance would give says no more than chance.
    `p` is that of the permutation test, with the maximum over all columns as in Westfall and Young.
    """

    name: str
    r2: float
    rho2: float
    low: float
    high: float
    bound: float
    p: float

    @property
    def shown(self) -> float:
        """`rho2` for a reader: no share of a variance is below zero, though an unbiased estimate may be."""
        return max(0.0, self.rho2)


@dataclass(frozen=True)
class Accuracy:
    """Mean over the classes of the share of their rows that are told right; `chance` is one over the classes."""

    value: float
    low: float
    high: float
    chance: float


def floor(live: int, n: int) -> float:
    """The rho2 that a fresh probe finds after an erasure fitted on `n` rows of `live` dimensions: r / (1 + r)."""
    r = (live - 1) / n
    return r / (1 + r)


def rows_for(live: int, wanted: float) -> int:
    """How many rows an eraser must be fitted on for a floor of `wanted`."""
    return math.ceil((live - 1) * (1 - wanted) / wanted)


def basis(x: np.ndarray) -> np.ndarray:
    """Orthonormal columns (m, r) that span the centred columns of x (m, d), each standardised first.

    Standardising brings in the dimensions whose spread is next to nothing (a LayerNorm gain of 1e-9): a probe can
    scale them up as well. What rounds to a constant is left out, and so are combinations whose singular value is below
    d times the rounding of x's type, as in numpy's matrix_rank: an erasure leaves nothing but rounding there.
    Raises UserError for NaN, and for fewer than two rows per dimension.
    """
    refuse_non_finite(x)
    rounding = float(np.finfo(x.dtype).eps) if x.dtype.kind == "f" else 0.0
    x = x.astype(np.float64)
    mean = x.mean(0)
    x -= mean
    spread = np.sqrt(np.mean(x**2, axis=0))
    x = x[:, spread > CONSTANT * np.abs(mean)]
    if not x.shape[1]:
        raise UserError("the vectors are all the same: there is nothing to probe")
    x /= np.sqrt(np.mean(x**2, axis=0))
    values, vectors = np.linalg.eigh(x.T @ x)
    kept = values > values[-1] * max(len(values) * np.finfo(np.float64).eps, (len(values) * rounding) ** 2)
    if len(x) < FEWEST * kept.sum() + 2:
        raise UserError(
            f"{len(x):,} rows cannot judge {int(kept.sum()):,} dimensions",
            fix=f"give fresh rows: at least {ASKED * int(kept.sum()):,}",
        )
    out: np.ndarray = x @ (vectors[:, kept] / np.sqrt(values[kept]))
    return out


def linear_probe(
    q: np.ndarray, z: np.ndarray, names: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> list[Linear]:
    """How well each column of z (m, k) can be read from vectors of which `q` (m, r) is the `basis`.

    For Gaussian rows the interval inverts the exact distribution of R2. For others the variance of R2 is estimated
    from the residuals of each row left out in turn, and widens it where it is larger than the Gaussian one.
    Raises UserError for NaN and for a column that is constant.
    """
    refuse_non_finite(z)
    z = z.astype(np.float64)
    size = np.abs(z).max(0)
    z = z - z.mean(0)
    length = np.sqrt((z**2).sum(0))
    if (flat := length <= CONSTANT * size * math.sqrt(len(z))).any():
        name = names[int(np.argmax(flat))]
        raise UserError(f"{name} is the same in all {len(z):,} rows: there is nothing to find", where="the fresh rows")
    z /= length
    squares = shuffled_squares(q, z, draws, seed)
    highest = squares.max(1)
    m, r = q.shape
    out = []
    for k, name in enumerate(names):
        fitted = q @ (q.T @ z[:, k])
        r2 = float(min(1.0, fitted @ z[:, k]))
        widen = excess(z[:, k] - fitted, z[:, k], np.einsum("ij,ij->i", q, q))
        low, high = interval(r2, m, r, widen, ALPHA / len(names))
        bound = max(high, interval(r / (m - 1), m, r, widen, ALPHA / len(names))[1])
        p = float(np.mean(highest >= squares[0, k] * (1 - 1e-6)))  # the first is the rows as they are
        out.append(Linear(name, r2, unbiased(r2, m, r), low, high, bound, p))
    return out


def unbiased(r2: float, n: int, p: int) -> float:
    """Olkin and Pratt's estimate of rho2 from R2 of n rows and p regressors; below zero as often as chance wants."""
    from scipy.special import hyp2f1

    left = min(1 - r2, 1 - 1e-12)  # at 1 scipy's function is NaN, and has been flat for long
    c = (n - p + 1) / 2
    # Where c is large scipy's function is NaN for some arguments; there its series is done after some terms.
    k = np.arange(1, SERIES)
    series = 1 + np.cumprod(left * k / (c + k - 1)).sum() if c > SERIES / 4 else hyp2f1(1, 1, c, left)
    return float(1 - (n - 3) / (n - p - 1) * left * series)


def excess(residual: np.ndarray, z: np.ndarray, leverage: np.ndarray) -> float:
    """By what factor the variance of R2 is larger than in Gaussian rows: 1 or more.

    From the influence of each row, psi = ((1 - rho2)(f^2 + 2 f e) - rho2 e^2) / Var(z), against 4 rho2 (1 - rho2)^2;
    f and e are what a fit without the row predicts and misses, so that a row's own noise does not count as signal.
    A standard error of Var(psi) is added: where tails are heavy most samples lack the far rows, and show too little.
    """
    e = residual / (1 - leverage - 1 / len(z))
    f = z - e
    total = np.mean(f**2) + np.mean(e**2)
    rho2 = np.mean(f**2) / total
    psi = ((1 - rho2) * (f**2 + 2 * f * e) - rho2 * e**2) / total
    square = (psi - psi.mean()) ** 2
    gaussian = 4 * rho2 * (1 - rho2) ** 2
    found = square.mean() + square.std() / math.sqrt(len(z))
    return max(1.0, float(found / gaussian)) if gaussian > 0 else 1.0


def interval(r2: float, n: int, p: int, widen: float = 1.0, alpha: float = ALPHA) -> tuple[float, float]:
    """Interval of rho2 of level 1 - alpha: all values at which R2 lies in neither tail of its distribution.

    A normal score of R2 is divided by the root of the variance's ratio to the Gaussian one. Only the part that goes
    with rho2 is widened, 4 rho2 (1 - rho2)^2 / n; the other, 2 p (1 - rho2)^2 / n^2, is the noise of p regressors.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    def score(rho2: float) -> float:
        below = min(max(chance_below(r2, n, p, rho2), 1e-300), 1 - 1e-16)
        ratio = (widen * 4 * rho2 / n + 2 * p / n**2) / (4 * rho2 / n + 2 * p / n**2)
        return float(ndtri(below) / math.sqrt(ratio))

    def root(level: float) -> float:
        if score(0.0) <= level:
            return 0.0
        top = 1 - 1e-9
        return top if score(top) >= level else float(brentq(lambda v: score(v) - level, 0.0, top, xtol=1e-8))

    tail = float(-ndtri(alpha / 2))
    return root(tail), root(-tail)


def chance_below(r2: float, n: int, p: int, rho2: float) -> float:
    """P(R2 <= r2) for n Gaussian rows and p random regressors: beta variables mixed by a negative binomial."""
    from scipy.special import betainc, gammaln

    if rho2 <= 0:
        return float(betainc(p / 2, (n - 1 - p) / 2, r2))
    half = (n - 1) / 2
    mean, spread = half * rho2 / (1 - rho2), math.sqrt(half * rho2) / (1 - rho2)
    k = np.unique(np.linspace(max(0.0, mean - 9 * spread - 9), mean + 9 * spread + 40, POINTS).round())
    weight = gammaln(half + k) - gammaln(k + 1) + k * math.log(rho2)
    weight = np.exp(weight - weight.max())
    return float(weight @ betainc(p / 2 + k, (n - 1 - p) / 2, r2) / weight.sum())


def shuffled_squares(features: np.ndarray, targets: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws + 1, k): |features' z|^2 of each column z of `targets` (m, k); first as the rows stand, then shuffled.

    `features` (m, r) stay as they are, so that all right-hand sides go through one product.
    """
    generator = np.random.default_rng(seed)
    features, targets = features.astype(np.float32), targets.astype(np.float32)
    m, k = targets.shape
    step = max(1, COLUMNS // k)
    out = []
    for first in range(0, draws + 1, step):
        count = min(step, draws + 1 - first)
        orders = [np.arange(m) if first + i == 0 else generator.permutation(m) for i in range(count)]
        moved = np.concatenate([targets[order] for order in orders], axis=1)
        out.append(((features.T @ moved) ** 2).sum(0, dtype=np.float64).reshape(count, k))
    return np.concatenate(out)


def linear_accuracy(q: np.ndarray, labels: np.ndarray, *, seed: int = 0, folds: int = 5) -> Accuracy:
    """Balanced accuracy of linear discriminants with equal priors, each row told by a fit that did not see it.

    `labels` (m,) are class numbers 0..K-1. Raises UserError for a class with fewer than `folds` rows.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold

    counts = class_counts(labels, folds)
    even = np.full(len(counts), 1 / len(counts))
    told = np.empty_like(labels)
    scaled = q * math.sqrt(len(q))
    for fit, rest in StratifiedKFold(folds, shuffle=True, random_state=seed).split(q, labels):
        model = LinearDiscriminantAnalysis(solver="lsqr", priors=even).fit(scaled[fit], labels[fit])
        told[rest] = model.predict(scaled[rest])
    return accuracy(labels, told)


def class_counts(labels: np.ndarray, fewest: int) -> np.ndarray:
    """Rows of each class; a UserError where there is one class only, or one with fewer than `fewest` rows."""
    counts = np.bincount(labels)
    if (counts > 0).sum() < 2:
        raise UserError("all rows are of one class: there is nothing to find", where="the fresh rows")
    if counts.min() < fewest:
        few = int(np.argmin(counts))
        what = f"class number {few} has {counts[few]:,} rows, {fewest} are needed"
        raise UserError(what, where="the fresh rows", fix="give fresh rows of every class, or leave the class out")
    return counts


def accuracy(labels: np.ndarray, told: np.ndarray) -> Accuracy:
    """Balanced accuracy with its 95 % interval: Wilson's for every class, put together by their squared distances."""
    from scipy.special import ndtri

    counts = np.bincount(labels)
    share = np.bincount(labels, weights=told == labels) / counts
    z2 = float(ndtri(1 - ALPHA / 2)) ** 2
    middle = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = np.sqrt(z2 * (share * (1 - share) / counts + z2 / (4 * counts**2))) / (1 + z2 / counts)
    down, up = (np.sqrt(((share - end) ** 2).sum()) / len(counts) for end in (middle - half, middle + half))
    value = float(share.mean())
    return Accuracy(value, max(0.0, value - float(down)), min(1.0, value + float(up)), 1 / len(counts))
