"""How far two models' vectors of the same texts lie apart, without any label: drift, not quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from embedtune import nearest
from embedtune.data.example import docstrings

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

TEXTS = 400
NEIGHBOURS = 10


@dataclass(frozen=True)
class Drift:
    """`overlap`: the share of each text's ten nearest texts that both models agree on, mean over the texts;
    `rank_correlation`: Spearman of all pairwise cosines; `cosine_change`: their mean absolute change. 1, 1 and 0 for a
    model and itself.
    """

    overlap: float
    rank_correlation: float
    cosine_change: float
    texts: int

    def line(self) -> str:
        """Both figures in words."""
        return (
            f"drift on {self.texts:,} general texts (docstrings): {self.overlap:.1%} of the ten nearest neighbours are "
            f"the base's, rank correlation of similarities {self.rank_correlation:.3f}; it says how much changed, not "
            "whether for the better"
        )


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
    return Drift(float(np.mean(shared)), correlation, float(np.abs(one - two).mean()), len(a))


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
