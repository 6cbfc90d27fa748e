"""`refine reduce`: fewer dimensions, or whitened ones, by one affine map that is folded into the model.

pca keeps dot products best (the leading directions of E[x x'], no centring); whiten gives all directions the same
variance (arXiv 2103.15316); top drops the mean and the d / 100 leading components (all-but-the-top, arXiv 1702.01417);
truncate keeps the first dimensions, which is what Matryoshka models are trained for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from embedtune.data.columns import parse_columns
from embedtune.data.read import Counts, read_texts
from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.refine.affine import Affine
from embedtune.refine.cached import Cached, Labelled, cache
from embedtune.refine.erase import Texts, counted
from embedtune.refine.eraser import whitening
from embedtune.refine.statistics import Statistics, accumulate

Method = Literal["pca", "whiten", "truncate", "top"]


@dataclass(frozen=True)
class Isotropy:
    """How evenly vectors fill their space."""

    isoscore: float  # 1: the same variance in all directions; 0: all of it in one (arXiv 2108.07344)
    mean_cosine: float  # of two texts; it tells how far the mean lies from zero, and nothing of the directions


@dataclass(frozen=True)
class Reduced:
    """The new model, and its vectors before and after."""

    folder: Path
    method: str
    place: str
    n: int
    before: Isotropy
    after: Isotropy
    dimensions: tuple[int, int]
    kept: float  # share of the variance that is in the dimensions kept
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words."""
        a, b = self.before, self.after
        return [
            f"{self.method}: {self.dimensions[0]:,} -> {self.dimensions[1]:,} dimensions, fitted on {self.n:,} texts; "
            f"{self.kept:.1%} of the variance kept",
            f"IsoScore {a.isoscore:.4f} -> {b.isoscore:.4f} (1: the same variance in all directions)",
            f"mean cosine of two texts {a.mean_cosine:.4f} -> {b.mean_cosine:.4f}: it tells where the mean lies, not "
            "whether the directions are used evenly",
            "neither says that the model got better: judge it on a task",
            *self.remarks,
            f"{self.folder}/ holds the model: {self.place}",
        ]


def fit_reduction(statistics: Statistics, to: int, method: Method) -> Affine:
    """The map (to, d) from the moments of the vectors. Raises UserError where so many dimensions do not live."""
    d = len(statistics.mean_x)
    if method not in get_args(Method):
        raise UserError(f"must be one of {', '.join(get_args(Method))}, not {method!r}", where="--method")
    if method == "truncate":
        _check(to, d)
        return Affine(np.eye(d)[:to], np.zeros(to))
    dropped = max(1, round(d / 100)) if method == "top" else 0
    covariance, mean = statistics.S_xx / statistics.weight, statistics.mean_x
    moment = covariance + np.outer(mean, mean) if method == "pca" else covariance
    values, vectors = np.linalg.eigh(moment)
    live = whitening(statistics).back.shape[1] + (method == "pca")  # an uncentred moment has the mean's direction too
    _check(to, min(d, live) - dropped)
    weight = vectors[:, ::-1].T[dropped : dropped + to]
    if method == "pca":
        return Affine(weight, np.zeros(to))
    if method == "whiten":
        weight = weight / np.sqrt(values[::-1][:to, None])
    return Affine(weight, -weight @ mean)


def _check(to: int, most: int) -> None:
    if not 1 <= to <= most:
        raise UserError(f"{to:,} dimensions cannot be kept: 1 to {most:,} are possible", where="--to")


def isotropy(used: Statistics, unit_mean: np.ndarray) -> Isotropy:
    """Figures from the moments of the vectors as they are used, and the mean (d,) of the normalised ones."""
    spread = np.linalg.eigvalsh(used.S_xx).clip(0)
    d = len(spread)
    if d == 1 or not spread.any():
        return Isotropy(0.0, float(unit_mean @ unit_mean))
    defect = np.linalg.norm(np.sqrt(d) * spread / np.linalg.norm(spread) - 1) / np.sqrt(2 * (d - np.sqrt(d)))
    dimensions = (d - defect**2 * (d - np.sqrt(d))) ** 2 / d
    return Isotropy(float((dimensions - 1) / (d - 1)), float(unit_mean @ unit_mean))


def reduce(
    model: str,
    texts: Texts,
    to: int,
    method: Method,
    out: str | Path,
    *,
    force: bool = False,
    precision: Any = "fp32",
    note: Callable[[str], None] = lambda text: None,
) -> Reduced:
    """Write `out`: the model with `to` dimensions. Raises UserError for a map that cannot be fitted."""
    from embedtune.encoder import embedder
    from embedtune.refine import bake

    source, counts = bake.source_of(model, out, force), Counts()
    opened = embedder.load_trainable(source)
    normalise = bake.take_normalize(opened.model)
    rows = read_texts(texts.data, columns=parse_columns(texts.columns), bad_rows=texts.bad_rows, counts=counts)
    with tempfile.TemporaryDirectory() as scratch:
        labelled: Iterator[Labelled] = ((row.values["text"], {}) for row in islice(rows, texts.rows))
        cached = cache(Path(scratch), bake.embedding(source, precision), labelled, note=note)
        # Normalised vectors have weight 1: PCA of them is PCA of raw ones, each weighted by 1 / |x|^2.
        weighted = method == "pca" and normalise
        moments = accumulate(_moments(cached, weighted))
        affine = fit_reduction(moments, to, method)
        before, after = (
            _figures(cached, each, normalise) for each in (Affine.identity(affine.weight.shape[1]), affine)
        )
        n = len(cached.x)
        del cached
    place = bake.attach(opened.model, affine, normalise)
    basis = np.linalg.qr(affine.weight.T)[0]
    kept = float(np.trace(basis.T @ moments.S_xx @ basis) / np.trace(moments.S_xx))
    reduced = Reduced(
        Path(out), method, place, n, before, after, affine.weight.shape[::-1], kept, tuple(counted(counts))
    )
    words = "\n".join(f"- {line}" for line in reduced.lines()[:-1])
    card = f"# Model with {to} dimensions\n\nMade from `{model}` with embedtune: {place}.\n\n{words}\n"
    bake.write_model(opened, Path(out), lambda folder, weights: None, card)
    return reduced


def _moments(cached: Cached, weighted: bool) -> Iterator[tuple[np.ndarray, ...]]:
    for rows in cached.blocks():
        x = cached.x[rows].astype(np.float64)
        z = np.zeros((len(x), 0))
        yield (x, z, 1 / np.maximum((x * x).sum(axis=1), 1e-300)) if weighted else (x, z)


def _figures(cached: Cached, affine: Affine, normalise: bool) -> Isotropy:
    mean = np.zeros(len(affine.bias))  # sum of the normalised vectors, at first

    def used() -> Iterator[tuple[np.ndarray, ...]]:
        for rows in cached.blocks():
            y = affine(cached.x[rows].astype(np.float64))
            mean[:] += unit(y).sum(axis=0)
            yield (unit(y) if normalise else y), np.zeros((len(y), 0))

    statistics = accumulate(used())
    return isotropy(statistics, mean / statistics.n)
