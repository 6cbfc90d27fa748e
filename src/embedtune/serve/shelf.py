"""An index that is served: its texts by id, its filters, its map, and the passage of a text that answers best."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.search.index import Index
from embedtune.search.views import Stacked

MAPPED = 4000  # dots of the map
SHOWN = 240  # characters of a dot's text
KINDS = 30  # values of a column that can be chosen from
LOOKED = 20_000  # rows that are looked through for these
CLUSTERS = 8
PASSAGE = 160  # characters of a passage, about
PASSAGES = 16  # of a text
SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+(?=\s|$)|\n|$)\s*")
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Shelf:
    """An open index under the name of its model."""

    name: str
    index: Index
    places: dict[str, int]
    filters: dict[str, list[str]]

    def text(self, key: str) -> str | None:
        """The text with an id; None where there is none."""
        row = self.places.get(key)
        return None if row is None else self.index.hit(row, 0.0).text

    def map(self) -> dict[str, Any]:
        """Dots: texts by the two main directions of their vectors, each coordinate from 0 to 1.

        At most MAPPED, evenly drawn. Their columns are those with few values, and the cluster (k-means).
        """
        rows = np.array(sorted(self.places.values()), np.int64)
        drawn = rows[np.unique(np.linspace(0, len(rows) - 1, min(MAPPED, len(rows))).astype(np.int64))]
        vectors = Stacked([segment.vectors for segment in self.index.segments], self.index.manifest.dimension)[drawn]
        spots, explained = flat(vectors)
        kinds = clusters(vectors)
        points = []
        for row, spot, kind in zip(drawn, spots.tolist(), kinds, strict=True):
            hit = self.index.hit(int(row), 0.0)
            columns = {name: value for name, value in hit.columns.items() if name in self.filters}
            points.append({"id": hit.id, "x": spot[0], "y": spot[1], "text": hit.text[:SHOWN],
                           "columns": {**columns, "cluster": kind}})  # fmt: skip
        return {"points": points, "total": len(rows), "explained": explained, "columns": [*self.filters, "cluster"]}


def open_shelf(index: Index, name: str) -> Shelf:
    """An index made ready to be served."""
    return Shelf(name, index, index.places(), filters(index))


def filters(index: Index) -> dict[str, list[str]]:
    """Columns with 2 to KINDS values among the first rows, and these values as texts."""
    values: dict[str, dict[str, None]] = {name: {} for name in index.manifest.columns}
    for cells in _cells(index):
        for name, value in cells.items():
            if value is not None and name in values:
                values[name][value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] = None
    return {name: sorted(found) for name, found in values.items() if 2 <= len(found) <= KINDS}


def _cells(index: Index) -> Iterator[dict[str, Any]]:
    left = LOOKED
    for segment in index.segments:
        for cells in segment.table.column("columns").slice(0, left).to_pylist():
            yield json.loads(cells)
        left -= min(left, segment.table.num_rows)


def flat(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, 2) coordinates from 0 to 1 along the two main directions, and their share of the variance."""
    x = vectors.astype(np.float64) - vectors.mean(0)
    values, directions = np.linalg.eigh(x.T @ x)
    total = values.sum()
    if not total > 0:
        return np.full((len(x), 2), 0.5), 0.0
    spots = x @ directions[:, [-1, -2]]
    low, high = np.quantile(spots, [0.005, 0.995], axis=0)  # a few that lie far out do not press all others together
    return np.clip((spots - low) / np.where(high > low, high - low, 1), 0, 1), float(values[-2:].sum() / total)


def clusters(vectors: np.ndarray) -> list[str]:
    """A name for the k-means cluster of each vector."""
    from sklearn.cluster import KMeans

    count = min(CLUSTERS, max(1, len(vectors) // 10))
    found = KMeans(count, n_init=1, random_state=0).fit_predict(vectors)
    return [f"group {number + 1}" for number in found]


def passages(text: str) -> list[Span]:
    """Spans of whole sentences, about PASSAGE characters each; none where the text is one passage."""
    if len(text) <= PASSAGE:
        return []
    spans: list[Span] = []
    start = 0
    for sentence in SENTENCE.finditer(text):
        end = sentence.end()
        if end - start >= PASSAGE or end == len(text):
            if end > start:
                spans.append((start, end))
            start = end
        if len(spans) == PASSAGES or end == len(text):
            break
    return spans
