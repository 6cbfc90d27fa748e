"""How far two models' vectors of the same texts lie apart, without any label: drift, not quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import orthogonal_procrustes
from scipy.stats import spearmanr

from embedtune import nearest
from embedtune.data.example import docstrings

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

TEXTS = 400
NEIGHBOURS = 10
FEWEST_PER_DIM = 4  # texts for each dimension, so that a half of them has twice as many as there are dimensions


@dataclass(frozen=True)
class Drift:
    """`overlap`: the share of each text's ten nearest texts that both models agree on, mean over the texts;
    `rank_correlation`: Spearman of all pairwise cosines; `cosine_change`: their mean absolute change. 1, 1 and 0 for a
    model and itself.

    `cosine`: mean cosine of a text's two vectors as they are (None where dimensions differ); `aligned`: after the
    orthogonal map that brings the second model's vectors nearest to the first's (Procrustes), fitted on one half of
    the texts and measured on the other, each way; None where there are fewer than FEWEST_PER_DIM texts a dimension.
    """

    overlap: float
    rank_correlation: float
    cosine_change: float
    texts: int
    cosine: float | None = None
    aligned: float | None = None

    def line(self, what: str = "general texts (docstrings)") -> str:
        """The figures in words."""
        said = (
            f"drift on {self.texts:,} {what}: {self.overlap:.1%} of the ten nearest neighbours are "
            f"the base's, rank correlation of similarities {self.rank_correlation:.3f}"
        )
        if self.cosine is not None:
            said += f", mean cosine of a text's two vectors {self.cosine:.3f}"
        if self.aligned is not None:
            said += f" ({self.aligned:.3f} after the best rotation)"
        return said + "; it says how much changed, not whether for the better"


def drift(before: np.ndarray, after: np.ndarray) -> Drift:
    """Compare vectors (n, D) and (n, E) of the same n texts."""
    a, b = nearest.unit(before), nearest.unit(after)
    k = min(NEIGHBOURS, len(a) - 1)
    shared = []
    for one, two in zip(_nearest(a, k), _nearest(b, k), strict=True):
        shared.append(len(np.intersect1d(one, two)) / k)
    upper = np.triu_indices(len(a), 1)
    one, two = (a @ a.T)[upper], (b @ b.T)[upper]
    correlation = float(spearmanr(one, two).statistic)
    cosine = float((a * b).sum(1).mean()) if a.shape == b.shape else None
    change = float(np.abs(one - two).mean())
    return Drift(float(np.mean(shared)), correlation, change, len(a), cosine, aligned(a, b))


def aligned(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean cosine of unit vectors (n, D) and (n, E) after the best orthogonal map of b, cross-fitted on two halves.

    The smaller ones are filled up with zeros, which changes no cosine. Fitted and measured on the same texts, a
    rotation would bring any two models together.
    """
    width = max(a.shape[1], b.shape[1])
    if len(a) < FEWEST_PER_DIM * width:
        return None
    a, b = (np.pad(v.astype(np.float64), ((0, 0), (0, width - v.shape[1]))) for v in (a, b))
    found = []
    for fit, test in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        rotation, _ = orthogonal_procrustes(b[fit], a[fit])
        found.append((a[test] * (b[test] @ rotation)).sum(1))
    return float(np.concatenate(found).mean())


def _nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    """(n, k) the nearest other rows of each row."""
    found = nearest.top_k(vectors.astype(np.float32), vectors.astype(np.float32), k + 1)[1]
    own = np.arange(len(vectors))[:, None]
    # A row is among its own nearest, but a copy of it may stand before it.
    kept = np.where((found == own).any(1)[:, None], found != own, np.arange(k + 1) < k)
    return found[kept].reshape(len(vectors), k)


def model_drift(base: Encoder, tuned: Encoder) -> Drift:
    """Drift between two models on text that neither was tuned on: docstrings of the packages installed here."""
    texts = [text for text in docstrings(TEXTS) if text]
    return drift(base.encode(texts), tuned.encode(texts))
