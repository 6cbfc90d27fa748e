"""An index: texts with their vectors in a folder, searched exactly, by words, or by both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import Encoder, identity, open_encoder, stream, usual_precision
from embedtune.errors import UserError, did_you_mean, short_list
from embedtune.nearest import top_k, unit
from embedtune.search import graph, lexical, store
from embedtune.search.contract import Asked, Found, Hit, Mode, Note, answer, checked, open_model, unknown_column
from embedtune.search.ids import Places
from embedtune.search.quantise import Dtype, check_dtype, restored
from embedtune.search.rows import Record
from embedtune.search.store import Manifest, Segment
from embedtune.search.views import Chosen, Restored, Stacked, signs

OVERSAMPLE = {
    "int8": 4,
    "binary": 40,
    "graph": 4,
}  # candidates for each hit that are scored again with the whole vectors


@dataclass(frozen=True, eq=False)
class Index:
    """An open index; what is added or deleted is on the disk when the call returns, and a new `Index` shows it."""

    folder: Path
    manifest: Manifest
    segments: Sequence[Segment]
    deleted: np.ndarray  # (n,) int64: rows that are not there any more
    encoder: Encoder
    words: Any = None  # the BM25 part, mapped; it stays readable when a later change removes its files

    @staticmethod
    def load(folder: str | Path, model: str | None = None, note: Note = lambda text: None) -> Index:
        """Open an index, and the model that it was made with (`model`: where that is now).

        Raises UserError where the index is damaged or of a newer version, or the model is another one.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder)
        encoder = open_model(manifest, model, str(folder), store.REBUILD, note)
        return open_with(folder, encoder)

    @property
    def place(self) -> str:
        """The folder."""
        return f"{self.folder}/"

    def __len__(self) -> int:
        return self.manifest.rows - len(self.deleted)

    def add(self, records: Iterable[Record], *, update: bool = False) -> Index:
        """Embed and add records; with `update` those whose ids are there replace them, else such an id is an error."""
        with files.locked(self.folder):
            now = open_with(self.folder, self.encoder)
            places = Places(now._ids(), now._live())
            new = checked(records, places.among, str(self.folder), update)
            blocks = store.embedded(lambda texts: stream(self.encoder, texts, "document"), new)
            manifest, _ = store.write_segment(self.folder, now.manifest, blocks)
            added = store.column(self.folder / manifest.segments[-1], "id")
            rows = np.concatenate([places.rows_of(ids) for ids in added])
            now._publish(manifest, np.concatenate([now.deleted, rows[rows >= 0]]))
        return open_with(self.folder, self.encoder)

    def delete(self, ids: Sequence[str]) -> Index:
        """Delete texts by their ids; an id that is not there is an error, and then nothing is deleted."""
        with files.locked(self.folder):
            now = open_with(self.folder, self.encoder)
            rows = Places(now._ids(), now._live()).rows_of(ids)
            if missing := [key for key, row in zip(ids, rows, strict=True) if row < 0]:
                left = compress(chain.from_iterable(now._ids()), now._live())
                near = did_you_mean(missing[0], list(islice(left, 10_000)))
                what = f"has no text with the id {short_list(missing)}{near}"
                raise UserError(what, where=str(self.folder), fix="nothing was deleted; give ids that are there")
            now._publish(now.manifest, np.concatenate([now.deleted, rows]), texts=False)
        return open_with(self.folder, self.encoder)

    def compact(self) -> Index:
        """Write what is not deleted to one new segment; nothing is embedded anew."""
        with files.locked(self.folder):
            now = open_with(self.folder, self.encoder)
            if not len(now):
                raise UserError("has nothing left in it", where=str(self.folder), fix="remove the folder")
            empty = replace(now.manifest, rows=0, columns=(), segments=(), deleted="", lexical="", files={})
            manifest, _ = store.write_segment(self.folder, empty, now._blocks())
            now._publish(manifest, np.zeros(0, np.int64))
        return open_with(self.folder, self.encoder)

    def search(
        self, queries: Sequence[str], top: int = 10, *, mode: Mode = "dense",
        where: Mapping[str, str] | None = None, vectors: np.ndarray | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        """The `top` best texts for each query, best first: by cosine, by BM25, or both; see `answer`."""
        return answer(self, queries, top, mode, where, vectors)

    def places(self) -> dict[str, int]:
        """The row of each id that is not deleted."""
        ids = (key for segment in self.segments for key in segment.table.column("id").to_pylist())
        return dict(compress(((key, row) for row, key in enumerate(ids)), self._live()))

    def chosen(self, where: Mapping[str, str]) -> np.ndarray | None:
        """Numbers of the rows that may be found; None for all."""
        if not where and not len(self.deleted):
            return None
        keep = self._live()
        for name, value in where.items():
            if name not in self.manifest.columns:
                raise unknown_column(name, self.manifest.columns)
            cells = [_matches(segment.table.column("columns"), name, value) for segment in self.segments]
            keep &= np.concatenate(cells)
        return np.flatnonzero(keep)

    def dense(self, asked: Asked, top: int, whole: bool) -> list[list[Found]]:
        """By cosine; codes or a graph, where the index has them and not `whole`, choose who is scored."""
        rows, given = asked.chosen, asked.vectors
        queries = unit(
            self.encoder.encode(list(asked.queries), "query") if given is None else np.asarray(given, np.float32)
        )
        vectors: Any = Stacked([segment.vectors for segment in self.segments], self.manifest.dimension)
        if whole or (self.manifest.dtype == "float32" and not self.manifest.graph):
            return _named(*top_k(queries, vectors if rows is None else Chosen(vectors, rows), top), rows)
        near = self._linked(queries, top, rows) if self.manifest.graph else self._by_codes(queries, top, rows)
        return [
            _named(*top_k(query[None], Chosen(vectors, candidates), top), candidates)[0]
            for query, candidates in zip(queries, near, strict=True)
        ]

    def _by_codes(self, asked: np.ndarray, top: int, rows: np.ndarray | None) -> list[np.ndarray]:
        """The candidates of each query by codes, ascending."""
        codes: Any = Stacked([self._coded(segment) for segment in self.segments], self.manifest.dimension)
        many = OVERSAMPLE[self.manifest.dtype] * top
        found = _named(*top_k(asked, codes if rows is None else Chosen(codes, rows), many), rows)
        return [np.sort([row for row, _ in each]).astype(np.int64) for each in found]

    def _linked(self, asked: np.ndarray, top: int, rows: np.ndarray | None) -> list[np.ndarray]:
        """The candidates of each query by the graphs; all rows where a filter leaves too few of them."""
        parts, start = [], 0
        for segment in self.segments:
            many = min(OVERSAMPLE["graph"] * top, segment.table.num_rows)
            found = graph.candidates(segment.graph, asked, many)
            parts.append(np.where(found < 0, -1, found + start))
            start += segment.table.num_rows
        everything = np.arange(start) if rows is None else rows
        near = [np.unique(each[each >= 0]) for each in np.concatenate(parts, axis=1)]
        if rows is not None:
            near = [np.intersect1d(each, rows) for each in near]
        return [each if len(each) >= min(top, len(everything)) else everything for each in near]

    def _coded(self, segment: Segment) -> Restored:
        width, ranges = self.manifest.dimension, segment.ranges
        if self.manifest.dtype == "int8" and ranges is not None:
            return Restored(segment.codes, lambda codes: restored(codes, ranges), width)
        return Restored(segment.codes, lambda codes: signs(codes, width), width)

    def lexical(self, asked: Asked, top: int) -> list[list[Found]]:
        """By BM25."""
        if not self.manifest.lexical:
            what = "was made without the package for lexical search"
            raise UserError(what, where=str(self.folder), fix=f"{lexical.FIX}, then embedtune search compact")
        if self.words is None:
            raise UserError("needs another package, bm25s", where="lexical search", fix=lexical.FIX)
        found, rows = [], asked.chosen
        for query in asked.queries:
            scores = lexical.scores(self.words, query)
            here = np.flatnonzero(scores > 0) if rows is None else rows[scores[rows] > 0]
            best = here[np.lexsort((here, -scores[here]))][:top]
            found.append([(int(row), float(scores[row])) for row in best])
        return found

    def hits(self, found: Sequence[Sequence[Found]]) -> list[list[Hit]]:
        """The texts of rows."""
        return [[self.hit(row, score) for row, score in each] for each in found]

    def hit(self, row: int, score: float) -> Hit:
        """The text in a row, by the row's number."""
        for segment in self.segments:
            if row < segment.table.num_rows:
                key, text, cells = (segment.table.column(name)[row].as_py() for name in ("id", "text", "columns"))
                return Hit(key, score, text, json.loads(cells))
            row -= segment.table.num_rows
        raise IndexError(row)

    def _ids(self) -> Iterator[list[str]]:
        """The ids of all rows, a block at a time; they are read while nobody else may change the folder."""
        return (block for name in self.manifest.segments for block in store.column(self.folder / name, "id"))

    def _live(self) -> np.ndarray:
        """Which rows are not deleted: (n,) bool."""
        live = np.ones(self.manifest.rows, bool)
        live[self.deleted] = False
        return live

    def _blocks(self) -> Iterator[store.Block]:
        """All that is not deleted, with its vectors."""
        kept, start = self._live(), 0
        for segment in self.segments:
            for first in range(0, segment.table.num_rows, store.BLOCK):
                part = segment.table.slice(first, store.BLOCK)
                keep = np.flatnonzero(kept[start + first : start + first + part.num_rows])
                cells = part.take(keep).to_pylist()
                records = [Record(row["id"], row["text"], json.loads(row["columns"])) for row in cells]
                if records:
                    yield records, np.asarray(segment.vectors[first + keep])
            start += segment.table.num_rows

    def _publish(self, manifest: Manifest, deleted: np.ndarray, texts: bool = True) -> None:
        """Publish a manifest with these rows deleted, its lexical part made anew where texts came or moved."""
        if len(deleted):
            manifest = store.with_deleted(self.folder, manifest, deleted)
        if texts:
            name = manifest.name("lexical")
            if lexical.is_there():
                parts = (block for s in manifest.segments for block in store.column(self.folder / s, "text"))
                lexical.build(self.folder / name, chain.from_iterable(parts))
            manifest = store.with_file(self.folder, manifest, "lexical", name)
        store.publish(self.folder, manifest)


def create(
    folder: Path, model: str, records: Iterable[Record], *, dtype: Dtype = "float32", ann: bool = False,
    precision: Precision | None = None, note: Note = lambda text: None,
) -> Index:  # fmt: skip
    """A new index of these records; `folder` appears when it is complete.

    `ann`: a graph of neighbours chooses the candidates; how many of the true neighbours it finds is noted.
    """
    check_dtype(dtype)
    if dtype == "float16":
        raise UserError("an index keeps float32, and int8 or binary beside it", where="--dtype")
    if ann and dtype != "float32":
        raise UserError("take one of both: each chooses the candidates", where="--ann and --dtype")
    precision = precision or usual_precision(model)
    encoder = open_encoder(model, precision=precision, note=note)
    name = str(Path(model).resolve()) if Path(model).is_dir() else model
    manifest = Manifest(name, identity(model), encoder.dimension, dtype, precision, graph=ann)
    place = folder.with_name(folder.name + ".running")
    shutil.rmtree(place, ignore_errors=True)  # of a build that was killed
    files.make_folder(place)
    try:
        store.publish(place, manifest)
        Index(place, manifest, (), np.zeros(0, np.int64), encoder).add(records)
        (place / files.LOCK).unlink()
        files.move_directory(place, folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    opened = open_with(folder, encoder)
    if ann:
        (part,) = opened.segments
        share = graph.recall(part.graph, part.vectors, OVERSAMPLE["graph"] * 10)
        note(f"the graph finds {share:.4f} of the ten true neighbours of its own texts (recall@10); --exact finds all")
    return opened


def open_with(folder: Path, encoder: Encoder) -> Index:
    """The index as it is now, with the opened model that made it.

    A writer may replace it while it is opened; then it is opened anew.
    """
    while True:
        manifest = store.read_manifest(folder)
        try:
            segments, deleted = store.open_segments(folder, manifest)
            words = lexical.load(folder / manifest.lexical) if manifest.lexical and lexical.is_there() else None
        except (UserError, OSError):
            if store.read_manifest(folder).serial == manifest.serial:
                raise
            continue
        if encoder.dimension != manifest.dimension:
            what = f"has {manifest.dimension} numbers a vector, the model gives {encoder.dimension}"
            raise UserError(what, where=str(folder), fix="use the model that the index was made with")
        return Index(folder, manifest, segments, deleted, encoder, words)


def _named(scores: np.ndarray, found: np.ndarray, rows: np.ndarray | None) -> list[list[Found]]:
    """Answers of top_k as (row, score), by the rows' own numbers."""
    numbers = found if rows is None else rows[found]
    return [list(zip(row.tolist(), score.tolist())) for row, score in zip(numbers, scores, strict=True)]


def _matches(cells: Any, name: str, value: str) -> np.ndarray:
    """Which rows have the value in the column: (N,) bool; what is no text is compared as JSON writes it."""
    import pyarrow.compute as pc

    written = (json.dumps(value, ensure_ascii=False)[1:-1], value)  # as a text in JSON, or as JSON itself
    maybe = pc.or_(*(pc.match_substring(cells, each) for each in written)).to_numpy(zero_copy_only=False)
    keep = np.zeros(len(cells), bool)
    for row in np.flatnonzero(maybe):
        found = json.loads(cells[int(row)].as_py()).get(name)
        keep[row] = (found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)) == value
    return keep
