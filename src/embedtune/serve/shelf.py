"""An index that is served: its texts by id, its filters, its map, and the passage of a text that answers best."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import Encoder, identity
from embedtune.errors import UserError
from embedtune.search.index import Index, open_with
from embedtune.search.store import Manifest, read_manifest
from embedtune.search.views import Stacked
from embedtune.serve.worker import Remote, open_remote

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


def check_indexes(name: str, indexes: Sequence[str]) -> None:
    """A UserError, before anything is loaded, where there is no such model or the first index is of another one."""
    own = identity(name)
    manifests = [read_manifest(Path(folder)) for folder in indexes]
    if manifests and manifests[0].identity != own:
        raise _another(manifests[0], indexes[0], name)


def _another(manifest: Manifest, folder: str, name: str) -> UserError:
    what = f"was made with {manifest.model}, which is not the model {name}"
    return UserError(what, where=folder, fix=f"serve {manifest.model}, or index the texts with {name}")


def open_all(
    name: str, indexes: Sequence[str], precision: Precision, batch_tokens: int
) -> tuple[Remote, list[tuple[Shelf, Remote]]]:
    """The model, and each index with the model behind it; the first index must be of this very model.

    Raises UserError where an index is damaged, or its model has changed or is not there.
    """
    model = open_remote(name, precision, batch_tokens)
    shelves: list[tuple[Shelf, Remote]] = []
    for folder in indexes:
        manifest = read_manifest(Path(folder))
        own = manifest.identity == model.sha256
        served = model if own or not shelves else open_remote(manifest.model, precision, batch_tokens)
        if served.sha256 != manifest.identity:
            raise _another(manifest, folder, served.name)
        # The index is asked with vectors: of its encoder it needs no more than the number of dimensions.
        index = open_with(Path(folder), cast(Encoder, served))
        shelves.append((open_shelf(index, Path(served.name).name), served))
    return model, shelves


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
