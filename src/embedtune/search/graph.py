"""An approximate first pass over many vectors: a graph of neighbours (HNSW), by the faiss package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.errors import UserError
from embedtune.nearest import top_k

FILE = "graph.npy"
LINKS, BUILD_EFFORT = 32, 200  # links of a vector; candidates that are looked at for them
SAMPLE = 200  # vectors that ask for their neighbours to measure the recall
FIX = "pip install 'embedtune[ann]'"


def _faiss() -> Any:
    import torch  # noqa: F401 - before faiss: both bring an OpenMP, and the first one is taken

    try:
        import faiss
    except ImportError as error:
        raise UserError("needs another package, faiss-cpu", where="approximate search", fix=FIX) from error
    return faiss


def build(place: Path, vectors: np.ndarray, block: int) -> None:
    """Write the graph of unit vectors (N, D) to `place`; graph and vectors are held in memory."""
    faiss = _faiss()
    made = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    made.hnsw.efConstruction = BUILD_EFFORT
    for start in range(0, len(vectors), block):
        made.add(np.ascontiguousarray(vectors[start : start + block]))
    files.write_array(place / FILE, faiss.serialize_index(made))


def load(place: Path) -> Any:
    """What `build` wrote; a UserError where the package is missing."""
    return _faiss().deserialize_index(np.load(place / FILE, allow_pickle=False))


def candidates(graph: Any, queries: np.ndarray, many: int) -> np.ndarray:
    """Numbers of about the `many` nearest vectors of each query: (Q, many) int64, -1 where there are no more."""
    graph.hnsw.efSearch = max(64, 2 * many)
    found: np.ndarray = graph.search(np.ascontiguousarray(queries), many)[1]
    return found


def recall(graph: Any, vectors: Any, many: int, top: int = 10) -> float:
    """The share of the true `top` neighbours among `many` candidates, for some of the vectors themselves."""
    asked = np.asarray(vectors[np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).astype(np.int64)])
    true, near = top_k(asked, vectors, top)[1], candidates(graph, asked, many)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(true.tolist(), near.tolist())]))
