"""What an erasure costs: tasks before and after, and how far the vectors of the same texts moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedtune.data.pairs import ScoredPair
from embedtune.data.retrieval import RetrievalSet
from embedtune.judge.compare import Difference, paired
from embedtune.judge.drift import Drift, drift
from embedtune.judge.retrieval import judge_retrieval
from embedtune.judge.similarity import judge_similarity
from embedtune.nearest import unit

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

RETRIEVAL, SIMILARITY = "nDCG@10", "spearman"
TEXTS = 1000  # whose cosines are compared, each with each


@dataclass(frozen=True)
class Task:
    """A measure on a data set, before and after, and the paired difference with its interval."""

    data: str
    measure: str
    before: float
    after: float
    difference: Difference


@dataclass(frozen=True)
class Hubness:
    """Correlation of log tokens with the mean cosine to other texts: 0 where long texts are no nearer to all others."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """How the vectors of the same texts moved, and what tasks lost or gained by it."""

    moved: Drift
    tasks: tuple[Task, ...] = ()


def hubness(x: np.ndarray, tokens: np.ndarray) -> Hubness:
    """Hubness by length of vectors (m, d) of texts of so many tokens (m,), with its 95 % interval (Fisher's z)."""
    near = unit(x.astype(np.float64))
    # The mean over all other rows: a row's cosine with itself says nothing.
    mean = (near @ near.sum(0) - 1) / (len(near) - 1)
    log = np.log(np.maximum(tokens, 1))
    if log.std() == 0 or mean.std() <= 1e-12:
        return Hubness(0.0, 0.0, 0.0)
    value = float(np.corrcoef(mean, log)[0, 1])
    z, half = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), 1.96 / np.sqrt(len(x) - 3)
    return Hubness(value, float(np.tanh(z - half)), float(np.tanh(z + half)))


def movement(before: np.ndarray, after: np.ndarray, seed: int = 0) -> Drift:
    """How far vectors of the same texts (m, D) and (m, E) moved, on a sample of them."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(before))[:TEXTS])
    return drift(before[rows], after[rows])


def tasks(
    base: Encoder,
    model: Encoder,
    retrieval: Sequence[RetrievalSet] = (),
    similarity: Sequence[tuple[str, Sequence[ScoredPair]]] = (),
) -> tuple[Task, ...]:
    """Both models on each data set."""
    found = []
    for data in retrieval:
        a, b = (judge_retrieval(encoder, data, [RETRIEVAL])[0] for encoder in (base, model))
        found.append(Task(data.name, RETRIEVAL, a.summary[RETRIEVAL], b.summary[RETRIEVAL], paired(a, b, RETRIEVAL)))
    for name, pairs in similarity:
        a, b = (judge_similarity(encoder, pairs, name)[0] for encoder in (base, model))
        found.append(Task(name, SIMILARITY, a.summary[SIMILARITY], b.summary[SIMILARITY], paired(a, b, SIMILARITY)))
    return tuple(found)
