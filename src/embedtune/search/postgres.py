"""An index in PostgreSQL: a table with texts, columns and vectors, searched there, exactly or by a graph (HNSW).

    NAME    number, id, text, columns (json), vector (vector or halfvec), words (tsvector)

The table's comment says which model made it, how, and the version of this form. A build is one transaction: rows are
copied into a new table, which takes the name of the old one at the end. So a kill leaves the old table or the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import Encoder, LocalEncoder, identity, open_encoder, stream, usual_precision
from embedtune.errors import UserError, did_you_mean, short_list
from embedtune.nearest import unit
from embedtune.search import database, tables
from embedtune.search.contract import Asked, Found, Hit, Mode, Note, answer, checked, open_model, unknown_column
from embedtune.search.database import Address, connected, writing
from embedtune.search.quantise import Dtype
from embedtune.search.rows import Record
from embedtune.search.store import embedded
from embedtune.search.tables import About, sql

REBUILD = "build the index anew: embedtune search index DATA --model M --out NAME --store ... --force"
SAMPLE, TOP = 40, 10  # texts that ask for so many neighbours, to measure the recall of a graph
EFFORT = (64, 1000)  # candidates that a graph looks at, at least and at most


@dataclass(frozen=True, eq=False)
class Table:
    """An open index in a database; every call has a connection of its own, so one that broke harms no later one."""

    store: Address
    name: str
    about: About
    encoder: Encoder

    @property
    def place(self) -> str:
        """The name, and the database without user and password."""
        return f"{self.name} in {self.store.shown}"

    def __len__(self) -> int:
        with self._reading() as ranks:
            return int(ranks.one("SELECT count(*) FROM {table}")[0])

    def add(self, records: Iterable[Record], *, update: bool = False) -> Table:
        """Embed and add records; with `update` those whose ids are there replace them, else such an id is an error."""
        with self._changing() as (connection, about):
            new = checked(records, lambda ids: tables.known(connection, self.name, ids), self.place, update)
            changed = _fill(connection, self.name, about, self.encoder, new, update)
            if changed != about:
                tables.describe(connection, self.name, changed)
        return replace(self, about=changed)

    def delete(self, ids: Sequence[str]) -> Table:
        """Delete texts by their ids; an id that is not there is an error, and then nothing is deleted."""
        with self._changing() as (connection, _):
            there = tables.known(connection, self.name, ids)
            if missing := [key for key in ids if key not in there]:
                near = did_you_mean(missing[0], tables.some_ids(connection, self.name))
                what = f"has no text with the id {short_list(missing)}{near}"
                raise UserError(what, where=self.place, fix="nothing was deleted; give ids that are there")
            tables.remove(connection, self.name, ids)
        return self

    def compact(self) -> Table:
        """Have the database take deleted rows out of the table and its graph (which it does by itself too, later)."""
        with connected(self.store) as connection:
            _same(self, tables.read(connection, self.store, self.name))
            connection.execute(sql("VACUUM (ANALYZE) {table}", table=self.name))
        return self

    def search(
        self, queries: Sequence[str], top: int = 10, *, mode: Mode = "dense",
        where: Mapping[str, str] | None = None, vectors: np.ndarray | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        """The `top` best texts for each query, best first: by vectors, by words, or both; see `answer`.

        The score of a vector is the model's own similarity (for distances it is below 0).
        """
        with self._reading() as ranks:
            return answer(ranks, queries, top, mode, where, vectors)

    @contextmanager
    def _reading(self) -> Iterator[Ranking]:
        """One view of the table, whatever is written meanwhile."""
        with connected(self.store) as connection:
            database.with_vectors(connection, self.store)
            with connection.transaction():
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                # Before the first look: a table that takes this one's place now has to wait until we are done.
                tables.hold(connection, self.store, self.name)
                about = tables.read(connection, self.store, self.name)
                _same(self, about)
                yield Ranking(connection, self.name, about, self.encoder)

    @contextmanager
    def _changing(self) -> Iterator[tuple[Any, About]]:
        with connected(self.store) as connection:
            database.with_vectors(connection, self.store)
            with writing(connection, self.name):
                about = tables.read(connection, self.store, self.name)
                _same(self, about)
                yield connection, about


def _same(table: Table, now: About) -> None:
    if (now.identity, now.dimension) != (table.about.identity, table.about.dimension):
        raise UserError("was replaced by an index of another model meanwhile", where=table.place, fix="open it anew")


@dataclass(frozen=True, eq=False)
class Ranking:
    """The rankings of a table within one transaction."""

    connection: Any
    name: str
    about: About
    encoder: Encoder

    def one(self, query: str) -> Any:
        """The first row of an answer."""
        return self.connection.execute(sql(query, table=self.name)).fetchone()

    def chosen(self, where: Mapping[str, str]) -> Mapping[str, str]:
        """The filters, after a look whether there are such columns."""
        for name in where:
            if name not in self.about.columns:
                raise unknown_column(name, self.about.columns)
        return where

    def dense(self, asked: Asked, top: int, whole: bool) -> list[list[Found]]:
        """By the model's similarity; all rows where `whole`, or where the graph and a filter leave too few."""
        given = self.encoder.encode(list(asked.queries), "query") if asked.vectors is None else asked.vectors
        if given.shape[1] != self.about.dimension:
            what = f"has {self.about.dimension} numbers a vector, the query has {given.shape[1]}"
            raise UserError(what, where=self.name, fix="use the model that the index was made with")
        found = []
        for vector in scaled(given, self.about):
            near = [] if whole else self._nearest(vector, top, asked.chosen, False)
            found.append(self._nearest(vector, top, asked.chosen, True) if whole or len(near) < top else near)
        return found

    def _nearest(self, vector: np.ndarray, top: int, where: Mapping[str, str], whole: bool) -> list[Found]:
        effort = str(min(EFFORT[1], max(EFFORT[0], 2 * top)))
        settings = {"enable_indexscan": "off" if whole else "on", "hnsw.ef_search": effort,
                    "hnsw.iterative_scan": "strict_order"}  # fmt: skip
        for name, value in settings.items():
            self.connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        return tables.nearest(self.connection, self.name, self.about, vector, top, where)

    def lexical(self, asked: Asked, top: int) -> list[list[Found]]:
        """By words: PostgreSQL's rank of each word, times how rare it is."""
        return [tables.by_words(self.connection, self.name, query, top, asked.chosen) for query in asked.queries]

    def hits(self, found: Sequence[Sequence[Found]]) -> list[list[Hit]]:
        """The texts of rows."""
        rows = tables.rows(self.connection, self.name, {row for each in found for row, _ in each})
        return [[Hit(rows[row][0], score, *rows[row][1:]) for row, score in each] for each in found]


def scaled(vectors: np.ndarray, about: About) -> np.ndarray:
    """Vectors as they are kept: of length one where the model goes by cosine, else as they are."""
    vectors = vectors.astype(np.float32)
    return unit(vectors) if about.similarity == "cosine" else vectors


def load(store: str, name: str, model: str | None = None, note: Note = lambda text: None) -> Table:
    """Open an index, and the model that it was made with (`model`: where that is now).

    Raises UserError where there is none of that name, it is of a newer version, or the model is another one.
    """
    address = database.parse(store)
    tables.check_name(name)
    with connected(address) as connection:
        about = tables.read(connection, address, name)
    encoder = open_model(about, model, f"{name} in {address.shown}", REBUILD, note)
    if encoder.dimension != about.dimension:
        what = f"has {about.dimension} numbers a vector, the model gives {encoder.dimension}"
        raise UserError(what, where=name, fix="use the model that the index was made with")
    return Table(address, name, about, encoder)


def create(
    store: str, name: str, model: str, records: Iterable[Record], *, dtype: Dtype = "float32", ann: bool = False,
    precision: Precision | None = None, force: bool = False,
) -> Table:  # fmt: skip
    """A new index of these records; it takes its name, and with `force` the place of an older one, when it is complete.

    `ann`: a graph of neighbours (HNSW); `recall` says how many of the true neighbours it finds.
    """
    address = database.parse(store)
    tables.check_name(name)
    with connected(address) as connection:
        database.with_vectors(connection, address, make=True)
        with writing(connection, name):
            tables.refuse_existing(connection, address, name, force)
            precision = precision or usual_precision(model)
            encoder = open_encoder(model, precision=precision)
            kept = str(Path(model).resolve()) if Path(model).is_dir() else model
            about = About(kept, identity(model), encoder.dimension, dtype, precision, _similarity(encoder), ann)
            tables.check_size(about)
            made = tables.new(connection, name, about)
            new = checked(records, lambda ids: (), name, False)
            about = _fill(connection, made, about, encoder, new, False)
            tables.finish(connection, made, name, about)
    return Table(address, name, about, encoder)


def _similarity(encoder: Encoder) -> str:
    """What the model says vectors are compared by; cosine where it says nothing."""
    found = getattr(encoder.model, "similarity_fn_name", None) if isinstance(encoder, LocalEncoder) else None
    return found or "cosine"


def _fill(
    connection: Any, table: str, about: About, encoder: Encoder, records: Iterable[Record], update: bool
) -> About:
    """Embed the records and copy them into a table, a block at a time; returns what it then holds."""
    columns, rows = set(about.columns), 0
    blocks = embedded(lambda texts: stream(encoder, texts, "document"), records, lambda found: scaled(found, about))
    for some, vectors in blocks:
        if update:
            tables.remove(connection, table, [record.id for record in some])
        tables.copy(connection, table, about, some, vectors)
        columns.update(*(record.columns for record in some))
        rows += len(some)
    if not rows:
        raise UserError("there is nothing to add: not one row", where=table)
    return replace(about, columns=tuple(sorted(columns)))


def recall(table: Table) -> float:
    """The share of the true neighbours that the graph finds, for some of the table's own vectors."""
    with table._reading() as ranks:
        asked = Asked([""] * SAMPLE, tables.sample(ranks.connection, table.name, SAMPLE), {})
        true, near = ranks.dense(asked, TOP, True), ranks.dense(asked, TOP, False)
    pairs = [({row for row, _ in a}, {row for row, _ in b}) for a, b in zip(true, near, strict=True)]
    return float(np.mean([len(a & b) / len(a) for a, b in pairs]))
