"""What holds for every index, be it a folder or a table in a database: what a hit is, and how an answer is made."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from embedtune.encoder.embed import WINDOW
from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import Encoder, identity, open_encoder
from embedtune.errors import UserError, did_you_mean
from embedtune.search.ids import Known
from embedtune.search.rows import Record

Mode = Literal["dense", "exact", "lexical", "hybrid"]
FUSED = 100  # hits of each ranking that are fused, at least
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009)
LONGEST = 100_000  # characters of a query

Note = Callable[[str], None]
Found = tuple[int, float]  # the number of a row and its score


@dataclass(frozen=True)
class Hit:
    """A text that was found; `score` is the cosine, the score by words, or the sum of reciprocal ranks."""

    id: str
    score: float
    text: str
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


class Searchable(Protocol):
    """An open index; every change is kept when the call returns, and the index that it returns shows it."""

    @property
    def place(self) -> str:
        """Where it is, in words."""

    @property
    def encoder(self) -> Encoder:
        """The model that made it."""

    def __len__(self) -> int:
        """How many texts there are."""

    def add(self, records: Iterable[Record], *, update: bool = False) -> Searchable:
        """Embed and add records; with `update` those whose ids are there replace them, else such an id is an error."""

    def delete(self, ids: Sequence[str]) -> Searchable:
        """Delete texts by their ids, all of them or none."""

    def compact(self) -> Searchable:
        """Take what was deleted off the disk."""

    def search(
        self, queries: Sequence[str], top: int = 10, *, mode: Mode = "dense",
        where: Mapping[str, str] | None = None, vectors: np.ndarray | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        """The `top` best texts for each query, best first; see `answer`."""


class Asked(NamedTuple):
    """Queries; their vectors (n, D), where they are there already; and what `Ranks.chosen` made of the filters."""

    queries: Sequence[str]
    vectors: np.ndarray | None
    chosen: Any


class Ranks(Protocol):
    """The rankings of an index, from which `answer` makes its answers."""

    def chosen(self, where: Mapping[str, str]) -> Any:
        """Which rows may be found; a UserError for a column that no text has."""

    def dense(self, asked: Asked, top: int, whole: bool) -> list[list[Found]]:
        """By vectors; `whole`: all of them, by all of their numbers."""

    def lexical(self, asked: Asked, top: int) -> list[list[Found]]:
        """By words."""

    def hits(self, found: Sequence[Sequence[Found]]) -> list[list[Hit]]:
        """The texts of rows."""


def answer(
    ranks: Ranks, queries: Sequence[str], top: int, mode: Mode,
    where: Mapping[str, str] | None, vectors: np.ndarray | None,
) -> list[list[Hit]]:  # fmt: skip
    """The `top` best texts for each query, best first.

    "dense" goes by vectors, and where the index has a graph or codes they choose who is scored; "exact" scores all.
    "lexical" goes by words, "hybrid" by reciprocal rank fusion of dense and lexical. `where`: only texts whose columns
    have these values. Raises UserError for an empty or over-long query and for a column that no text has.
    """
    for query in queries:
        if not query.strip() or len(query) > LONGEST:
            what = "a query is empty" if not query.strip() else f"a query has {len(query):,} characters"
            raise UserError(what, where="query", fix=f"give words, at most {LONGEST:,} characters")
    if top < 1:
        raise UserError(f"must be at least 1, not {top}", where="--top")
    asked = Asked(queries, vectors, ranks.chosen(where or {}))
    wide = max(FUSED, 10 * top)
    match mode:
        case "lexical":
            found = ranks.lexical(asked, top)
        case "hybrid":
            pairs = zip(ranks.dense(asked, wide, False), ranks.lexical(asked, wide), strict=True)
            found = [fuse(pair)[:top] for pair in pairs]
        case _:
            found = ranks.dense(asked, top, mode == "exact")
    return ranks.hits(found)


def fuse(rankings: Iterable[Sequence[Found]]) -> list[Found]:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the rankings that have the row, best first."""
    sums: dict[int, float] = {}
    for ranking in rankings:
        for rank, (row, _) in enumerate(ranking, 1):
            sums[row] = sums.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(sums.items(), key=lambda found: (-found[1], found[0]))


def unknown_column(name: str, columns: Sequence[str]) -> UserError:
    """That no text has this column, and which ones there are."""
    near, known = did_you_mean(name, columns), ", ".join(columns) or "none"
    return UserError(f"no text has a column {name!r}{near}; there are: {known}", where="--where")


def checked(
    records: Iterable[Record], there: Callable[[list[str]], Container[str]], where: str, update: bool
) -> Iterator[Record]:
    """The records; a UserError for one that may not be added. `there` says which of some ids the index has already."""
    rest, before = iter(records), Known()
    while some := list(islice(rest, WINDOW)):
        ids = [record.id for record in some]
        known, fresh = there(ids), before.among(ids)
        for record in some:
            if record.id in fresh:
                what = f"two of the new texts have the id {record.id[:80]!r}"
                raise UserError(what, fix="give each text an id of its own")
            if record.numbered and record.id in known:
                what = f"has a text number {record.id} already, and the new rows have no ids of their own"
                raise UserError(what, where=where, fix="give the data a column id")
            if record.id in known and not update:
                what = f"has the id {record.id[:80]!r} already"
                raise UserError(what, where=where, fix="search update replaces texts by their ids")
            fresh.add(record.id)
            yield record
        before.add(ids)


class Made(Protocol):
    """What an index remembers of the model that made it."""

    @property
    def model(self) -> str:
        """Its name or folder."""

    @property
    def identity(self) -> str:
        """What tells it apart."""

    @property
    def precision(self) -> Precision:
        """Its arithmetic."""


def open_model(made: Made, model: str | None, where: str, rebuild: str, note: Note) -> Encoder:
    """The model of an index (`model`: where that is now); a UserError where it is another one, or not there."""
    name = model or made.model
    try:
        found = identity(name)
    except UserError as error:
        what = f"was made with {name}, which cannot be opened: {error.what}"
        raise UserError(what, where=where, fix="say with --model where that model is now") from error
    if found != made.identity:
        what = f"was made with {made.model}, and {name} is not that model any more"
        raise UserError(what, where=where, fix=f"give the same model with --model, or {rebuild}")
    return open_encoder(name, precision=made.precision, note=note)
