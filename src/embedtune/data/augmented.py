"""A file grown by new texts of its training rows: only the text changes, what repeats is refused, all is counted.

The rows and what is made of them are held in memory: this is for small sets.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from embedtune import files
from embedtune.data.augment import KINDS, Augmenting, Made, Maker
from embedtune.data.clean import words_hash
from embedtune.data.labels import TEXTS
from embedtune.data.lines import SKIP, Problem, ending
from embedtune.data.named import Named, find_column, name_of, named, usable
from embedtune.data.pairs import DROP
from embedtune.data.read import EXAMPLES, BadRows, Counts, DataLike, Row, place, read_rows
from embedtune.data.retrieval import is_beir
from embedtune.data.sides import Judged, outside
from embedtune.data.tidy import Writer
from embedtune.errors import UserError, short_list

WRITTEN = (".jsonl", ".csv", ".tsv", ".parquet")
# The user may name the label too, as for training; it is only copied.
COLUMNS = {**TEXTS, "label": ("label",), "score": ("score",)}
ADDED = ("augmented", "source_row")
SPLIT, TRAIN = "split", ("train", "training")
HELD_OUT = re.compile(r"(?:^|[^a-z])(?:dev|test|valid|validation|eval|heldout|held-out)(?:[^a-z]|$)", re.I)
MOST_WORDS = 500  # of a text, that are looked at for it
MEASURED = 1000  # new texts of a kind that the share of changed words is measured on
REPEATS_ROW, REPEATS_NEW = "repeats a row of the file", "repeats another new text"


class Source(NamedTuple):
    """A row, which one of all that were read (from 1), its columns of texts, and whether it may be augmented."""

    row: Row
    number: int
    columns: tuple[str, ...]
    train: bool

    def texts(self) -> list[str]:
        """The texts in those columns; '' for an empty cell."""
        return [str(self.row.values.get(name) or "") for name in self.columns]


@dataclass
class Tried:
    """What became of a kind: asked == made + sum(refused.values()).

    `changed` is the mean share of words that the first `measured` new texts do not share, in order, with their
    sources; `examples` are pairs (before, after).
    """

    asked: int = 0
    made: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    changed: float = 0.0
    measured: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Count a new text that was not made, or not taken."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def take(self, before: str, after: str) -> None:
        """Count one that was."""
        self.made += 1
        if self.measured < MEASURED:
            self.changed = (self.changed * self.measured + words_changed(before, after)) / (self.measured + 1)
            self.measured += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((before, after))


@dataclass(frozen=True)
class Augmented:
    """What `augment` did: `rows` were read and used, `train` of them augmented, `written` stand in the file."""

    out: str
    rows: int
    train: int
    new: int
    written: int
    kinds: dict[str, Tried]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check_out(data: DataLike, out: str | Path, force: bool) -> None:
    """A UserError where `out` cannot be written."""
    path = Path(out)
    form, packing = ending(path)
    if form not in WRITTEN or packing:
        what = f"cannot be written; known are {', '.join(WRITTEN)}"
        raise UserError(what, where=str(path), fix="give --out one of these endings")
    if path.is_dir() or (path.exists() and not force):
        raise UserError("exists already", where=str(path), fix="name another file, or --force")
    if not path.parent.is_dir():
        raise UserError("its folder does not exist", where=str(path), fix="make the folder, or name another")
    outside(data, path)


def read_sources(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    pair: bool = False,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> list[Source]:
    """All rows with their columns as they are; those with another `split` than train are not to be augmented.

    The text is the column that `columns` gives, "text", or one of its synonyms. Rows without a text (with `pair`,
    without either) are named together in one UserError, or left out and counted where bad_rows is not "fail". Raises
    UserError too where no row is one of train, or the file has been augmented before.
    """
    tally = counts if counts is not None else Counts()
    if isinstance(data, (str, Path)) and is_beir(data):
        fix = "augment corpus.jsonl or queries.jsonl alone"
        raise UserError("is a BEIR folder, not one table", where=str(data), fix=fix)
    must = ("text", "text_pair") if pair else ("text",)
    rows = named(_fresh(read_rows(data, bad_rows=bad_rows, counts=tally)), COLUMNS, must, columns, tally)
    found = list(usable(_sources(rows, must, tally), name_of(data), bad_rows, tally))
    _check_split(found, name_of(data), tally)
    return found


def augment(
    sources: Sequence[Source], out: str | Path, how: Augmenting, makers: Mapping[str, Maker], counts: Counts
) -> Augmented:
    """Write `out` (.jsonl, .csv, .tsv, .parquet): each row, followed by its new ones, which differ in the text alone.

    Two columns are added: `augmented` names the kind (empty in the rows themselves), `source_row` the row it comes
    from, counted over all that was read. No new text equals a row of the file, or another new one, but for case and
    blanks. What a row gives does not depend on the order of the rows. Raises UserError where nothing new comes out.
    """
    path, kinds = Path(out), {kind: Tried() for kind in how.kinds}
    new = _accepted(sources, _candidates(sources, how, makers, kinds), kinds)
    many = sum(map(len, new.values()))
    if not many:
        details = [f"{kind}: {n:,} x {reason}" for kind, tried in kinds.items() for reason, n in tried.refused.items()]
        raise UserError("nothing to write: not one new text came out", where=str(path), details=details)
    rows = list(_rows(sources, new, how.only_new))
    notes = [*counts.notes, *_warnings(sources, counts), *_write(path, rows)]
    train = sum(source.train for source in sources)
    return Augmented(str(path), len(sources), train, many, len(rows), kinds, notes)


def words_changed(before: str, after: str) -> float:
    """The share of words, of the longer text's, that do not stand in both texts in one order: 0 for the same words.

    Of long texts the beginnings are compared: the time grows with the square of the number of words.
    """
    one, two = before.split()[:MOST_WORDS], after.split()[:MOST_WORDS]
    blocks = difflib.SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks()
    return 1 - sum(block.size for block in blocks) / max(len(one), len(two))


def _fresh(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, after a look at their columns: of an augmented file, or of one whose labels hang on its words."""
    for row in rows:
        if taken := [name for name in ADDED if name in row.values]:
            what = f"has a column {taken[0]!r} already: was it augmented before?"
            raise UserError(what, where=place(row), fix="give the file that it was made of, or rename the column")
        if "tokens" in row.values:
            fix = "give texts with one label, or several, in each row"
            raise UserError("has tokens, and tags would not fit their changed ones", where=place(row), fix=fix)
        yield row


def _sources(rows: Iterable[Named], must: Sequence[str], tally: Counts) -> Iterator[tuple[Row, Source | list[Problem]]]:
    for row, cells, names in rows:
        problems = [what for our in must if (what := _no_text(cells.get(our), names[our]))]
        columns = tuple(names[our] for our in ("text", "text_pair") if our in names)
        yield row, problems or Source(row, tally.rows, columns, _split(row) in (None, *TRAIN))


def _no_text(value: Any, name: str) -> Problem | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        what = f"column {name!r} is empty"
        return Problem(what, what, fix=DROP)
    what = f"column {name!r} holds {type(value).__name__} where a text must stand"
    return None if isinstance(value, str) else Problem(what, what, fix=SKIP)


def _split(row: Row) -> str | None:
    """What stands in the column `split`, in lower case; None where there is no such column."""
    name = find_column((SPLIT,), list(row.values))
    return None if name is None else str(row.values[name]).strip().lower()


def _check_split(sources: Sequence[Source], where: str, tally: Counts) -> None:
    """Say what is done about the column `split`; a UserError where no row is one of train."""
    if all(source.train for source in sources):
        return
    others = sorted({_split(source.row) or "" for source in sources if not source.train})
    left = sum(not source.train for source in sources)
    if left == len(sources):
        what = f"has no training row: its column {SPLIT!r} holds {short_list([repr(each) for each in others])}"
        raise UserError(what, where=where, fix="give the training rows, in whose column it says train")
    many = f"{left:,} rows of {short_list([repr(each) for each in others])} are kept as they are"
    tally.notes.append(f"only rows whose {SPLIT!r} is train are augmented: {many}")


def _candidates(
    sources: Sequence[Source], how: Augmenting, makers: Mapping[str, Maker], kinds: Mapping[str, Tried]
) -> Iterator[tuple[int, int, str, list[str]]]:
    """(place of the source, number of the copy, kind, texts) of all that could be made; the rest is counted."""
    changing = 2 if how.pair else 1
    texts = {text for source in sources if source.train for text in source.texts()[:changing]}
    # Of one length, for models that take many at once; and in an order that is not the rows'.
    ordered = sorted(texts, key=lambda text: (len(text), text))
    for kind in how.kinds:
        made = dict(zip(ordered, makers[kind](ordered)))
        for number, source in enumerate(sources):
            if not source.train:
                continue
            old = source.texts()
            sides: list[Made] = [made[text] for text in old[:changing]]
            kinds[kind].asked += how.copies
            for copy in range(how.copies):
                if all(copy >= len(side.texts) for side in sides):
                    kinds[kind].refuse(sides[0].missing[copy - len(sides[0].texts)])
                    continue
                new = [side.texts[copy] if copy < len(side.texts) else text for side, text in zip(sides, old)]
                yield number, copy, kind, new + old[changing:]


def _accepted(
    sources: Sequence[Source], candidates: Iterator[tuple[int, int, str, list[str]]], kinds: Mapping[str, Tried]
) -> dict[int, list[tuple[str, list[str]]]]:
    """For each source's place its new texts with their kinds, without what repeats a row or another of them."""
    seen = {_hash(source.texts()) for source in sources}
    # Of two rows that give one new text, which may keep it is decided by what stands in them, not by their order.
    draw = [words_hash([json.dumps(source.row.values, default=str, sort_keys=True)]) for source in sources]
    found: dict[int, list[tuple[str, list[str]]]] = {}
    rows = set(seen)
    for number, _, kind, texts in sorted(candidates, key=lambda each: (draw[each[0]], KINDS.index(each[2]), each[1])):
        plain = _hash(texts)
        if plain in seen:
            kinds[kind].refuse(REPEATS_ROW if plain in rows else REPEATS_NEW)
            continue
        seen.add(plain)
        found.setdefault(number, []).append((kind, texts))
        both = [(old, new) for old, new in zip(sources[number].texts(), texts) if old != new]
        kinds[kind].take(*(" ".join(side) for side in zip(*both)))
    return found


def _hash(texts: Sequence[str]) -> int:
    """Equal for rows whose texts are equal but for case and blanks; a NUL, which no text has, parts them."""
    return words_hash([word for text in texts for word in (*text.casefold().split(), "\0")])


def _rows(
    sources: Sequence[Source], new: Mapping[int, list[tuple[str, list[str]]]], only_new: bool
) -> Iterator[dict[str, Any]]:
    for number, source in enumerate(sources):
        kind_column, row_column = ADDED
        if not only_new:
            yield {**source.row.values, kind_column: None, row_column: source.number}
        for kind, texts in new.get(number, []):
            changed = {
                name: text for name, text, old in zip(source.columns, texts, source.texts()) if text != old
            }  # an empty cell of a text that does not change stays what it is
            yield {**source.row.values, **changed, kind_column: kind, row_column: source.number}


def _warnings(sources: Sequence[Source], counts: Counts) -> list[str]:
    """What must be known of whoever uses the file."""
    notes = [f"{n:,} rows left out: {reason}" for reason, n in counts.rejected.items()]
    notes += [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]
    for name in counts.files:
        if HELD_OUT.search(name if ":" in name else Path(name).name) and all(source.train for source in sources):
            notes.append(f"{name}: by its name this is held-out data, and what is measured on new texts of it is wrong")
    return [
        *notes,
        "only training rows may be augmented, never those of dev or test: a new text is nearly a copy of its row. "
        f"Split first; or afterwards with --by {ADDED[1]}",
    ]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the rows in the format of the ending; what it could not keep, in words."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ADDED)) + list(ADDED)
    form = ending(path)[0]
    with files.growing(path) as file:
        if form == ".parquet":
            _write_parquet(file, rows, names, path)
            return []
        writer = Writer(form, names, file)
        for number, row in enumerate(rows):
            writer.add(Judged(Row(row, str(path), number, number), [], []))
        return writer.notes()


def _write_parquet(file: BinaryIO, rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            what = f"column {name!r} holds values of several types, which a parquet column cannot"
            raise UserError(what, where=str(path), fix="--out with the ending .jsonl") from error
    pq.write_table(pa.table(columns), file)
