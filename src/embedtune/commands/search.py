"""embedtune search: an index of texts, and what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedtune import recipes
from embedtune.commands.shape import Command, Flags, Output, Talk, refuse_existing, table
from embedtune.errors import UserError

if TYPE_CHECKING:
    from embedtune.search.contract import Searchable

Left = Callable[[], list[str]]  # says afterwards how many rows were left out
CLIP = 80  # characters of a text that is shown


@dataclass(frozen=True)
class Build:
    """Embed the texts of a file and keep them in a folder that can be searched."""

    # Texts: .txt (one a line), .jsonl, .csv, .tsv, .parquet (also .gz, .zst), a folder of them; "-" is lines of stdin.
    # A column id is the id of a text; all other columns are kept and can be filtered by.
    data: str
    # Model: a folder, a hub name, openai:MODEL, vertex:MODEL.
    model: str
    # Folder of the index, or its name in a --store; it appears when it is complete.
    out: str
    # A database that keeps the index instead of a folder: postgresql://USER@HOST/DATABASE, with pgvector.
    store: str | None = None
    # int8 or binary: search reads a quarter or a 32nd of the bytes, and scores the best again with whole vectors.
    # float16: half the bytes, in a --store.
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    # Approximate search: a graph of neighbours (HNSW; faiss, or pgvector) chooses who is scored; its recall is said.
    ann: bool = False
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that cannot be read: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Arithmetic of the model (derived: bf16 where the hardware has it, else fp32).
    precision: recipes.Precision | None = None
    # Replace an index of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Query:
    """The texts that are nearest to words, with their scores; --queries FILE asks for many at once."""

    # Folder of the index, or its name in the --store.
    index: str = ""
    # The database that keeps the index: postgresql://USER@HOST/DATABASE.
    store: str | None = None
    # What to look for.
    words: str = ""
    # Queries: a file with one a line (or .jsonl, .csv ... with a column text), instead of words.
    queries: str | None = None
    # So many texts for each query.
    top: int = 10
    # Only texts whose column has this value: column=value. May be given several times.
    where: tuple[str, ...] = ()
    # Whole vectors only, where the index has int8 or binary ones or a graph too.
    exact: bool = False
    # By words alone (BM25).
    lexical: bool = False
    # By vectors and by words: the two rankings are fused.
    hybrid: bool = False
    # A second model whose scores of the texts that were found stand beside.
    beside: str | None = None
    # Where the model of the index is now, if it was moved.
    model: str | None = None
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Add:
    """Embed more texts into an index; an id that is there already is an error here, and replaced by `search update`."""

    # Folder of the index, or its name in the --store.
    index: str = ""
    # The database that keeps the index: postgresql://USER@HOST/DATABASE.
    store: str | None = None
    # Texts, as for `search index`.
    data: str = ""
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that cannot be read: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Where the model of the index is now, if it was moved.
    model: str | None = None
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Delete:
    """Delete texts from an index by their ids."""

    # Folder of the index, or its name in the --store.
    index: str = ""
    # The database that keeps the index: postgresql://USER@HOST/DATABASE.
    store: str | None = None
    # The ids.
    ids: tuple[str, ...] = ()
    # Where the model of the index is now, if it was moved.
    model: str | None = None
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Compact:
    """Write what is not deleted to one new part, and make the words' statistics anew; nothing is embedded."""

    # Folder of the index, or its name in the --store.
    index: str
    # The database that keeps the index: postgresql://USER@HOST/DATABASE.
    store: str | None = None
    # Where the model of the index is now, if it was moved.
    model: str | None = None
    # Print the result as JSON.
    json: bool = False


def build(command: Build, talk: Talk) -> Output:
    """Make the index."""
    if command.store:
        made, left = _in_database(command, talk)
    else:
        made, left = _in_folder(command, talk)
    return _said(made, f"{len(made):,} texts in {made.place}", left())


def _in_folder(command: Build, talk: Talk) -> tuple[Searchable, Left]:
    from embedtune.search import lexical
    from embedtune.search.index import create

    if not command.force:
        refuse_existing(command.out, force=False)
    records, left = _records(command)
    if not lexical.is_there():
        talk.note(f"without the package bm25s there is no lexical and no hybrid search: {lexical.FIX}")
    made = create(Path(command.out), command.model, records, dtype=command.dtype, ann=command.ann,
                  precision=command.precision, note=talk.note)  # fmt: skip
    return made, left


def _in_database(command: Build, talk: Talk) -> tuple[Searchable, Left]:
    from embedtune.search.postgres import create, recall

    records, left = _records(command)
    made = create(command.store or "", command.out, command.model, records, dtype=command.dtype, ann=command.ann,
                  precision=command.precision, force=command.force)  # fmt: skip
    if command.ann:
        talk.note(f"the graph finds {recall(made):.4f} of the ten true neighbours of its own texts (recall@10)")
    return made, left


def add(command: Add, talk: Talk) -> Output:
    """Add, and refuse ids that are there."""
    return _added(command, talk, update=False)


def update(command: Add, talk: Talk) -> Output:
    """Add, and replace what has the same ids."""
    return _added(command, talk, update=True)


def _added(command: Add, talk: Talk, update: bool) -> Output:
    if not (command.index and command.data):
        raise UserError("name an index and data", fix="embedtune search add INDEX DATA")
    opened = _open(command, talk)
    records, left = _records(command)
    before, given = len(opened), 0

    def counted() -> Iterator[Any]:
        nonlocal given
        for record in records:
            given += 1
            yield record

    opened = opened.add(counted(), update=update)
    replaced = given - (len(opened) - before)
    words = f", {replaced:,} of them in place of older ones" if update else ""
    return _said(opened, f"texts added: {given:,}{words}; {len(opened):,} in {opened.place}", left())


def delete(command: Delete, talk: Talk) -> Output:
    """Delete, all of the ids or none."""
    if not (command.index and command.ids):
        raise UserError("name an index and ids", fix="embedtune search delete INDEX ID [ID ...]")
    opened = _open(command, talk).delete(command.ids)
    return _said(opened, f"{len(set(command.ids)):,} texts deleted: {len(opened):,} in {opened.place}", [])


def compact(command: Compact, talk: Talk) -> Output:
    """Write it anew."""
    opened = _open(command, talk).compact()
    return _said(opened, f"{len(opened):,} texts in {opened.place}", [])


def query(command: Query, talk: Talk) -> Output:
    """Search, and show."""
    from embedtune.data.read import read_texts
    from embedtune.encoder.encode import open_encoder

    chosen = [name for name in ("exact", "lexical", "hybrid") if getattr(command, name)]
    if len(chosen) > 1:
        raise UserError("exclude each other", where=" and ".join(f"--{name}" for name in chosen))
    if not command.index or bool(command.queries) == bool(command.words.strip()):
        what = "name an index, and either words or --queries FILE; a query cannot be empty"
        raise UserError(what, fix='embedtune search query INDEX "words to look for"')
    asked = [command.words]
    if command.queries:
        asked = [row.values["text"] for row in read_texts(command.queries)]
    mode: Any = chosen[0] if chosen else "dense"
    found = _open(command, talk).search(asked, command.top, mode=mode, where=_where(command.where))
    data = [{"query": q, "hits": [vars(hit) for hit in hits]} for q, hits in zip(asked, found, strict=True)]
    if command.beside:
        _beside(open_encoder(command.beside, note=talk.note), data)
    return Output(_shown(data, command.beside), data)


def _beside(encoder: Any, data: list[dict[str, Any]]) -> None:
    """The cosine by another model of each query and each text that was found for it."""
    from embedtune.nearest import Unit

    for entry in data:
        if entry["hits"]:
            asked = Unit(encoder.encode([entry["query"]], "query"))[:]
            texts = Unit(encoder.encode([hit["text"] for hit in entry["hits"]], "document"))[:]
            entry["hits"] = [
                {**hit, "beside": float(s)} for hit, s in zip(entry["hits"], texts @ asked[0], strict=True)
            ]


def _shown(data: list[dict[str, Any]], beside: str | None) -> list[str]:
    header = ["id", "score", *([beside] if beside else []), "text"]
    lines: list[str] = []
    for entry in data:
        rows = []
        for hit in entry["hits"]:
            scores = [f"{hit[name]:.4f}" for name in ("score", "beside") if name in hit]
            rows.append([hit["id"], *scores, _clip(hit["text"])])
        widest = max((len(row[-1]) for row in rows), default=0)
        rows = [[*row[:-1], row[-1].ljust(widest)] for row in rows]  # texts to the left
        lines += ["", entry["query"][:CLIP]] if len(data) > 1 else []
        lines += table([*header[:-1], "text".ljust(widest)], rows) if rows else ["nothing was found"]
    return lines[1:] if lines and not lines[0] else lines


def _clip(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= CLIP else plain[: CLIP - 1] + "…"


def _where(filters: tuple[str, ...]) -> dict[str, str]:
    pairs = [part.partition("=") for part in filters]
    if wrong := [name for name, sign, _ in pairs if not (name and sign)]:
        raise UserError(f"{wrong[0]!r} is not of the form column=value", where="--where")
    return {name: value for name, _, value in pairs}


def _open(command: Any, talk: Talk) -> Searchable:
    if command.store:
        from embedtune.search import postgres

        return postgres.load(command.store, command.index, command.model, talk.note)
    from embedtune.search.index import Index

    return Index.load(command.index, command.model, talk.note)


def _records(command: Any) -> tuple[Iterator[Any], Left]:
    """The rows of the data, and what says afterwards how many were left out."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.read import Counts
    from embedtune.encoder.shapes import bound_memory
    from embedtune.search.rows import read_records

    bound_memory()
    counts = Counts()

    def left() -> list[str]:
        words = ((counts.rejected, "left out"), (counts.replaced, "mended"))
        return [
            *counts.notes,
            *(f"{n:,} rows {word}: {reason}" for which, word in words for reason, n in which.items()),
        ]

    return read_records(command.data, parse_columns(command.columns), command.bad_rows, counts), left


def _said(opened: Searchable, line: str, more: list[str]) -> Output:
    if cut := getattr(opened.encoder, "truncated", 0):
        more = [*more, f"{cut:,} texts are longer than the model reads: only their beginning was embedded"]
    return Output([line, *more], {"index": opened.place.removesuffix("/"), "texts": len(opened), "remarks": more})


def _words(*flags: str) -> Any:
    """The words before the first flag are the values of these flags."""

    def parse(argv: list[str]) -> Flags:
        many = next((n for n, word in enumerate(argv) if word.startswith("-") and word != "-"), len(argv))
        given, rest = argv[:many], argv[many:]
        named = [f"{flag}={word}" for flag, word in zip(flags, given)]
        return [*named[: len(flags)], *given[len(flags) :], *rest], None

    return parse


def _ids(argv: list[str]) -> Flags:
    many = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    if many < 2:
        return [*(["--index", *argv[:1]] if many else []), *argv[many:]], None
    return ["--index", argv[0], "--ids", *argv[1:]], None


COMMANDS = {
    "search index": Command("DATA --model M --out DIR", "texts to an index", Build, build, None,
                            _words("--data")),
    "search query": Command('INDEX "words"', "what is nearest, by vectors, by words, or both", Query, query, None,
                            _words("--index", "--words")),
    "search add": Command("INDEX DATA", "more texts", Add, add, None, _words("--index", "--data")),
    "search update": Command("INDEX DATA", "texts in place of those with their ids", Add, update, None,
                             _words("--index", "--data")),
    "search delete": Command("INDEX ID [ID ...]", "texts away, by their ids", Delete, delete, None, _ids),
    "search compact": Command("INDEX", "what was deleted, off the disk", Compact, compact, "--index"),
}  # fmt: skip
