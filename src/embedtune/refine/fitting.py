"""Fit the map of an erasure on cached embeddings, and measure what it did to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate as running
from typing import Any

import numpy as np

from embedtune.nearest import unit
from embedtune.refine import eraser
from embedtune.refine.affine import Affine
from embedtune.refine.cached import Cached
from embedtune.refine.concepts import Encoding, encode
from embedtune.refine.eraser import canonical_correlations, whitened_concept, whitening
from embedtune.refine.sphere import SETTLED, Chunks, sphere
from embedtune.refine.statistics import Statistics, accumulate

ONE_WAY = 4  # squared length of the mean, in variances: there the mean cosine of two texts is about 0.8
PAIRS = 1000  # pairs of texts whose cosines are compared


@dataclass(frozen=True, eq=False)
class Found:
    """A map, and its figures on the rows it was fitted on."""

    affine: Affine
    n: int
    live: int  # dimensions that carry anything
    rank: int  # dimensions that were taken away
    correlations: tuple[float, ...]  # canonical ones, of the vectors with all concepts together, before
    r2: tuple[tuple[float, float], ...]  # of the best linear read-out of each concept from the output, before and after
    left: float  # the largest covariance of the output with a concept, in standard deviations of both sides
    passes: int  # over the vectors; 1 where the moments are enough
    cosines: float  # how much the cosine of two texts changes, on average
    variance: float  # share of the output's variance that is gone
    remarks: tuple[str, ...]


def fit_map(
    cached: Cached,
    concepts: tuple[Encoding, ...],
    preserve: tuple[Encoding, ...],
    method: str,
    strength: float,
    normalise: bool,
) -> Found:
    """The map for all `concepts`, and what it does to the model's output; `normalise`: a Normalize follows it.

    Concepts of the token count come first; `cached.z` holds the others, then what is to be preserved.
    """
    of_tokens = [each for each in concepts if each.source != "column"]
    keep = sum(each.width for each in preserve)

    def chunks(affine: Affine | None = None, *, out: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in cached.blocks():
            x = cached.x[rows].astype(np.float64)
            x = affine(x) if affine else x
            z = np.hstack([encode(of_tokens, {}, cached.tokens[rows]), cached.z[rows]])
            yield (unit(x) if out and normalise else x), z

    moments = accumulate(chunks())
    affine, passes, remarks = _map(chunks, moments, method, keep, strength)
    white = whitening(moments)
    before, after = accumulate(chunks(out=True)), accumulate(chunks(affine, out=True))
    ends = list(running((each.width for each in concepts), initial=0))
    parts = [slice(a, b) for a, b in zip(ends, ends[1:])]
    everything = slice(ends[-1])
    gone = white.back @ white.forward - affine.weight
    return Found(
        affine=affine,
        n=moments.n,
        live=white.back.shape[1],
        rank=int(np.linalg.matrix_rank(gone, tol=1e-6)),
        correlations=tuple(canonical_correlations(moments, everything).tolist()),
        r2=tuple((best_r2(before, part), best_r2(after, part)) for part in parts),
        left=largest_covariance(after, everything),
        passes=passes,
        cosines=cosine_change(cached.x, lambda x, rows: affine(x)),
        variance=1 - float(np.trace(after.S_xx) / np.trace(before.S_xx)),
        remarks=tuple(remarks),
    )


def _map(chunks: Chunks, moments: Statistics, method: str, keep: int, strength: float) -> tuple[Affine, int, list[str]]:
    """The map, its passes over the vectors, and what is to be said of it, the worst last."""
    remarks, last, white, shrunk = [], [], whitening(moments), True
    if method == "sphere":
        fitted = sphere(chunks, moments, keep=keep, strength=strength)
        affine, passes = fitted.affine, len(fitted.found)
        shrunk = not fitted.projects  # a projection asks for no correlations
        if shrunk:
            remarks.append("projections did not settle: the map has LEACE's metric, which can cost more retrieval")
        if fitted.left > SETTLED:
            last = [
                f"note: {passes} passes of the sphere method did not converge: {fitted.left:.1e} of covariance left; "
                f"erase fewer concepts at once, or fit on more texts{_one_way(moments)}"
            ]
    else:
        kept: dict[str, Any] = {"keep": keep} if keep else {}
        affine, passes = eraser.METHODS[method](moments, strength=strength, **kept), 1
    if white.shrinkage:
        few = f"{moments.n:,} texts are few for {white.back.shape[1]:,} dimensions"
        by = f": for the map their correlations were shrunk by {white.shrinkage:.0%}"
        remarks.append(few + by if shrunk else few)
    return affine, passes, [*remarks, *last]


def _one_way(moments: Statistics) -> str:
    """What to do about vectors whose mean is far longer than their spread.

    Divided by their norms such vectors keep of the common direction only |rest|^2 / 2 |mean|^2. No small map can make
    that uncorrelated with anything: the part along the mean would have to move as far as the mean itself.
    """
    if np.sum(moments.mean_x**2) < ONE_WAY * np.trace(moments.S_xx) / moments.weight:
        return ""
    return ". The vectors all point one way; first take that away: embedtune refine reduce --method top"


def best_r2(statistics: Statistics, part: slice) -> float:
    """R2 of the best linear read-out of the best combination of a concept's columns; a scalar has only one."""
    found = canonical_correlations(statistics, part)
    return float(found[0] ** 2) if len(found) else 0.0


def largest_covariance(statistics: Statistics, part: slice) -> float:
    """The largest covariance of a coordinate with a part of the concept, in standard deviations of both sides."""
    covariance = statistics.S_xz @ whitened_concept(statistics, part) / statistics.weight
    return float(np.abs(covariance).max(initial=0) / np.sqrt(np.trace(statistics.S_xx) / statistics.weight))


def cosine_change(x: np.ndarray, changed: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Mean absolute change of the cosine of two texts that stand far apart; `changed(x, rows)` maps some rows of x."""
    m = min(PAIRS, len(x) // 2)
    chosen = np.linspace(0, len(x) - 1, 2 * m).astype(int)
    raw = x[chosen].astype(np.float64)
    one, other = (np.einsum("ij,ij->i", each[:m], each[m:]) for each in (unit(raw), unit(changed(raw, chosen))))
    return float(np.abs(one - other).mean()) if m else 0.0
