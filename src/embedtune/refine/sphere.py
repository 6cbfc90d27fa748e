"""Sphere: a map after which the *normalised* vectors have no covariance with a concept.

Normalising is not linear: divided by its norm, even a constant offset tells the norm, and norms tell much (length above
all). So LEACE followed by normalisation can leave more than there was. Here the norms are part of the condition. With
y = T h, h = (x about its mean, 1) and the norms u = 1/|y| held fast, Cov(y/|y|, z) = 0 reads T C = 0, C = E[u h z'].
Of the maps that fulfil it T0 (I - C (C'C)^-1 C') takes the span of C and nothing else. Then the norms are computed
anew. LEACE's I - C (C'MC)^-1 C'M, M = E[u^2 h h']^-1, changes vectors less on average and rankings more (docs/why.md);
it is taken where the projections do not settle, as where a concept fills a third of the dimensions.
That the round trip converges is measured, not proved; Anderson's acceleration (Walker and Ni, 2011) makes it fast
where norms vary much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from embedtune.errors import UserError
from embedtune.refine.affine import Affine
from embedtune.refine.eraser import COLLINEAR, Whitening, check_room, removal, whitened_concept, whitening
from embedtune.refine.statistics import Statistics

Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # (x (m, d), z (m, k)), from the start at each call
SETTLED = 1e-10  # covariance that a map which is exact may leave
ENOUGH = 1e-12  # covariance, in standard deviations of both sides, that counts as none
SHORTEST = 1e-3  # of the mean norm: below it a vector's direction is rounding
MEMORY = 6  # passes that the acceleration looks back; more remember what no longer holds
RISE = 10  # a pass that leaves so many times what the best one left starts the acceleration anew


@dataclass(frozen=True, eq=False)
class Sphere:
    """The map to put before the normalisation, and the covariance that was left after each pass."""

    affine: Affine
    projects: bool  # else LEACE's metric was taken
    found: tuple[float, ...]  # before the first pass, after the first, ...; in standard deviations of both sides
    left: float  # the smallest of them, that of `affine`
    rank: int


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one pass over the rows tells about the map T (d, r + 1)."""

    T: np.ndarray
    concept: np.ndarray  # E[u h z'] (r + 1, q), z whitened, u in units of the mean norm
    kept: np.ndarray  # the same of what is to be preserved (r + 1, p)
    second: np.ndarray | None  # E[u^2 h h'] (r + 1, r + 1) where the change is to be least
    size: float  # of the covariance
    low: float  # the smallest norm, as a part of the mean one
    row: int  # whose it is


def sphere(
    chunks: Chunks,
    statistics: Statistics,
    *,
    keep: int = 0,
    strength: float = 1.0,
    passes: int = 60,
) -> Sphere:
    """Fit the map on a stream of (x, z) that `chunks()` starts anew for each pass; `statistics` are its moments.

    The last `keep` columns of z are preserved, at the norms reached. The best map of all passes is the result, with the
    covariance it leaves; a step that makes things worse is damped, and so is one that makes a vector vanish, since its
    direction would be noise. `strength` t goes that part of the way.
    Raises UserError where a vector vanishes from the start, or where the concept takes all dimensions.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"must lie between 0 and 1, not {strength:g}", where="--strength")
    white = whitening(statistics)
    frame, projects = _even(white), True
    done = _settled(chunks, statistics, frame, True, keep, passes)
    if done.best.size > SETTLED:
        other = _settled(chunks, statistics, white, False, keep, passes)
        if other.best.size < done.best.size:
            frame, projects, done = white, False, other
    identity = np.column_stack([frame.back, frame.mean])
    T = identity + strength * (done.best.T - identity)
    weight = T[:, :-1] @ frame.forward
    return Sphere(
        Affine(weight, T[:, -1] - weight @ frame.mean), projects, tuple(done.found), done.best.size, done.rank
    )


def _even(white: Whitening) -> Whitening:
    """Coordinates of the live directions as long as they are, in units of the mean spread."""
    basis, spread, _ = np.linalg.svd(white.back, full_matrices=False)
    unit = float(np.sqrt(np.mean(spread**2)))
    return Whitening(white.mean, basis.T / unit, basis * unit, 0.0)


class _Settled(NamedTuple):
    """The best pass, what each one left, and how many dimensions go."""

    best: _Pass
    found: list[float]
    rank: int


def _settled(
    chunks: Chunks, statistics: Statistics, frame: Whitening, projects: bool, keep: int, passes: int
) -> _Settled:
    """Passes until nothing is left, in the coordinates of `frame`."""
    # A dead coordinate starts at its mean. It does not stay there: a constant, normalised, would tell the norm.
    identity = np.column_stack([frame.back, frame.mean])
    split = len(statistics.mean_z) - keep
    wanted = [whitened_concept(statistics, part) for part in (slice(split), slice(split, None))]
    now = best = _look(chunks, statistics, frame, identity, wanted, projects)
    _check_norms(best)
    found, damping = [best.size], 1.0
    history = [(identity, identity @ _removal(best, frame.shrinkage))]
    rank = int(np.linalg.matrix_rank(identity - history[0][1], tol=1e-6 * np.linalg.norm(identity, 2)))
    check_room(rank, identity.shape[1] - 1)
    while best.size > ENOUGH and len(found) <= passes:
        now = _look(chunks, statistics, frame, _mixed(history), wanted, projects)
        found.append(now.size)
        if now.size > RISE * best.size or now.low < SHORTEST:
            damping /= 2
            history = [(best.T, best.T + damping * (identity @ _removal(best, frame.shrinkage) - best.T))]
            continue
        best = min(best, now, key=lambda each: each.size)
        history = [*history, (now.T, identity @ _removal(now, frame.shrinkage))][-MEMORY:]
    return _Settled(best, found, rank)


def _look(
    chunks: Chunks, statistics: Statistics, frame: Whitening, T: np.ndarray, wanted: list[np.ndarray], projects: bool
) -> _Pass:
    """One pass over all rows with the map T."""
    r = T.shape[1]
    crosses = [np.zeros((r, each.shape[1])) for each in wanted]
    second, first, n, low, row, norms = np.zeros((r, r)), np.zeros(r), 0, np.inf, 0, 0.0
    for x, z in chunks():
        h = np.column_stack([(x - frame.mean) @ frame.forward.T, np.ones(len(x))])
        norm = np.linalg.norm(h @ T.T, axis=1)
        if norm.min(initial=np.inf) < low:
            low, row = float(norm.min()), n + int(norm.argmin())
        norms, n = norms + norm.sum(), n + len(x)
        h /= np.maximum(norm, 1e-300)[:, None]
        centred = z - statistics.mean_z
        for cross, each in zip(crosses, wanted, strict=True):
            cross += h.T @ (centred @ each)
        if not projects:
            second += h.T @ h
        first += h.sum(axis=0)
    variance = 1 - float(np.sum((T @ first / n) ** 2))  # of the normalised vectors, all dimensions together
    size = float(np.linalg.norm(T @ crosses[0] / n) / np.sqrt(max(variance, 1e-300)))
    unit = norms / n  # the vectors' scale is none of the map's business
    concept, kept = (unit * cross / n for cross in crosses)
    return _Pass(T, concept, kept, None if projects else unit**2 * second / n, size, low / unit, row)


def _check_norms(now: _Pass) -> None:
    if now.low < SHORTEST:
        raise UserError(
            f"its vector is {now.low:.2g} times as long as the mean one: normalised, it is noise",
            where=f"vectors, row {now.row:,}",
            fix="leave the row out (its text is probably empty)",
        )


def _removal(now: _Pass, shrinkage: float) -> np.ndarray:
    """What T0 is multiplied with (r + 1, r + 1) so that no covariance would be left if the norms stayed as they are."""
    if now.second is None:
        return removal(now.concept, now.kept)
    second = (1 - shrinkage) * now.second + shrinkage * np.diag(np.diag(now.second))
    values, vectors = np.linalg.eigh(second)
    alive = values > COLLINEAR * values[-1]
    root, vectors = np.sqrt(values[alive]), vectors[:, alive]
    forward, back = vectors.T / root[:, None], vectors * root
    gone = np.eye(len(root)) - removal(forward @ now.concept, forward @ now.kept)
    return np.eye(len(second)) - back @ gone @ forward


def _mixed(history: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Anderson's acceleration of T -> G(T): the mixture of the last G whose steps G - T cancel best."""
    T, G = (np.stack([each.ravel() for each in side]) for side in zip(*history))
    steps = G - T
    if len(history) == 1:
        return history[0][1]
    weights = np.linalg.lstsq(np.diff(steps, axis=0).T, steps[-1], rcond=None)[0]
    return (G[-1] - weights @ np.diff(G, axis=0)).reshape(history[-1][1].shape)
