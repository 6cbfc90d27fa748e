"""The gate of an export: how far its vectors are from those of the model, and whether that is near enough.

Four figures: the largest difference of two numbers, the worst cosine, how many of the ten nearest neighbours stay the
same, and what a dev set says (nDCG@10, or Spearman for scored pairs).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedtune.encoder.encode import Encoder
from embedtune.judge.retrieval import judge_retrieval
from embedtune.judge.similarity import judge_similarity
from embedtune.nearest import unit

NEIGHBOURS = 10
TIE = 1e-5  # cosines nearer than this are equal: then either neighbour is right
RETRIEVAL, SIMILARITY = "nDCG@10", "spearman"


@dataclass(frozen=True)
class Limits:
    """What an export may differ by; None stands for a figure that is said and not judged."""

    difference: float | None  # of two numbers, as a share of the largest number of the model's vectors above one
    neighbours: float  # share of the ten nearest that has to stay
    loss: float | None  # of the dev measure
    cosine: float | None = None  # the worst


LIMITS = {
    "onnx": Limits(1e-5, 0.999, 0.001),
    "openvino": Limits(1e-5, 0.999, 0.001),
    "onnx-int8": Limits(None, 0.8, 0.005, 0.95),
    # Another model: only its user knows how much less is still enough.
    "static": Limits(None, 0.06, None),
}


@dataclass(frozen=True)
class Nearness:
    """Vectors of an export beside those of its model."""

    texts: int
    difference: float | None  # the largest, over max(1, the model's largest number); None: of another dimension
    cosine: float | None  # the worst
    neighbours: float


@dataclass(frozen=True)
class Dev:
    """A dev set's measure, of the model and of the export."""

    data: str
    measure: str
    before: float
    after: float


@dataclass(frozen=True)
class Parity:
    """All figures, and the limits they are held against."""

    near: Nearness
    dev: Dev | None
    limits: Limits

    @property
    def least(self) -> float:
        """The share of neighbours that has to stay: its limit, and twice what chance keeps of so few texts."""
        return round(max(self.limits.neighbours, min(1.0, 2 * NEIGHBOURS / max(1, self.near.texts - 1))), 3)

    def lines(self) -> list[str]:
        """The figures in words."""
        near, limits = self.near, self.limits
        shown = f"on {near.texts:,} texts: "
        if near.difference is not None:
            shown += f"largest difference {near.difference:.1e}{_limit(limits.difference)}, "
            shown += f"worst cosine {near.cosine:.6f}{_limit(limits.cosine, 'at least')}, "
        shown += f"{near.neighbours:.1%} of the ten nearest texts are the same{_limit(self.least, 'at least')}"
        if self.dev is None:
            return [shown]
        dev = self.dev
        change = f"{dev.data}: {dev.measure} {dev.before:.4f} -> {dev.after:.4f}"
        return [shown, change + _limit(limits.loss, "may lose")]

    def faults(self) -> list[str]:
        """What is beyond its limit; empty for a good export."""
        near, limits, found = self.near, self.limits, []
        if limits.difference is not None and not (near.difference or 0.0) <= limits.difference:
            found.append(f"its vectors differ by {near.difference:.1e}")
        if limits.cosine is not None and not (near.cosine or 0.0) >= limits.cosine:
            found.append(f"its worst cosine is {near.cosine:.3f}")
        if not near.neighbours >= self.least:
            found.append(f"only {near.neighbours:.1%} of the nearest texts stay")
        if self.dev and limits.loss is not None and not self.dev.before - self.dev.after <= limits.loss:
            found.append(f"{self.dev.measure} falls by {self.dev.before - self.dev.after:.4f}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For export.json and --json."""
        return asdict(self)


def _limit(value: float | None, words: str = "at most") -> str:
    return "" if value is None else f" ({words} {value:g})"


def nearness(wanted: np.ndarray, found: np.ndarray) -> Nearness:
    """Figures of the vectors (n, d) of a model and (n, e) of its export; difference and cosine only where d = e.

    A neighbour counts as the same where the model itself holds it as near as its own tenth.
    """
    k = min(NEIGHBOURS, len(wanted) - 1)
    similar, other = (_cosines(vectors) for vectors in (wanted, found))
    tenth = np.sort(similar, axis=1)[:, -k]
    chosen = np.argsort(-other, axis=1, kind="stable")[:, :k]
    same = float((np.take_along_axis(similar, chosen, 1) >= tenth[:, None] - TIE).mean())
    if not np.isfinite(found).all():
        same = 0.0
    if wanted.shape != found.shape:
        return Nearness(len(wanted), None, None, same)
    size = max(1.0, float(np.abs(wanted).max()))
    cosine = float((unit(wanted.astype(np.float64)) * unit(found.astype(np.float64))).sum(1).min())
    return Nearness(len(wanted), float(np.abs(wanted - found).max()) / size, cosine, same)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """Cosines (n, n) of all pairs; no text is its own neighbour."""
    rows = unit(vectors.astype(np.float64))
    out = rows @ rows.T
    np.fill_diagonal(out, -np.inf)
    return out


def judge_dev(model: Encoder, export: Encoder, data: Any) -> Dev:
    """Model and export on a dev set: `data` has a `name`, and `retrieval` or else `scored` pairs."""
    if data.retrieval:
        before, after = (judge_retrieval(e, data.retrieval, [RETRIEVAL])[0].summary[RETRIEVAL] for e in (model, export))
        return Dev(data.name, RETRIEVAL, before, after)
    before, after = (judge_similarity(e, data.scored, data.name)[0].summary[SIMILARITY] for e in (model, export))
    return Dev(data.name, SIMILARITY, before, after)
