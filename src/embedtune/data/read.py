"""Text in: streams rows out of files, folders and lists, says what is wrong with the rest, counts all of it.

The formats know nothing of policies: what becomes of a bad row (fail, skip, replace) is decided in one place,
`settle`.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from embedtune.data import formats
from embedtune.data.formats import BLANK, Header, Items
from embedtune.data.hub import HUB, hub
from embedtune.data.lines import Problem, ending, find_files
from embedtune.errors import UserError, did_you_mean, short_list

DataLike = str | Path | Sequence[str | Mapping[str, Any]]
BadRows = Literal["fail", "skip", "replace"]

EXAMPLES = 3
TEXT = {"text": "text"}
PACKED = 3  # times that text is usually larger than packed


class Row(NamedTuple):
    """One record: its cells by column name, and where it stands (`number` counts lines or records from 1)."""

    values: dict[str, Any]
    file: str
    number: int
    document: int


def place(row: Row) -> str:
    """Where a row stands, in words."""
    return place_of(row.file, row.number)


def place_of(file: str, number: int) -> str:
    """The same from the two numbers that say it."""
    unit = "line" if ending(Path(file))[0] in (".txt", ".jsonl") else "row"
    return f"{file}, {'item' if file == 'the list' else unit} {number:,}"


@dataclass
class Counts:
    """The tally of a read, right at every moment of it: rows == used + sum(rejected.values()).

    `bytes` and `sha256` are of the decompressed content, so that changed data is noticed whatever its
    packing. `examples` has up to three places for each reason in `rejected` and `replaced`, `fixes` a remedy.
    """

    rows: int = 0
    used: int = 0
    bytes: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    fixes: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _hash: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hex digest of all content read so far."""
        return self._hash.hexdigest()

    def add(self, content: builtins.bytes) -> None:
        """Count content that was read."""
        self.bytes += len(content)
        self._hash.update(content)

    def note(self, which: dict[str, int], problem: Problem, place: str) -> None:
        """Count a row's problem in `rejected` or `replaced`, and keep its place as an example."""
        which[problem.reason] = which.get(problem.reason, 0) + 1
        places = self.examples.setdefault(problem.reason, [])
        if len(places) < EXAMPLES:
            places.append(place)
        self.fixes.setdefault(problem.reason, problem.fix)


def read_rows(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
    header: bool = True,
    names: bool = False,
) -> Iterator[Row]:
    """Stream the rows of a file, folder or list; `columns` renames: {"text": "body"} takes "body" as "text".

    Without a `header` the columns of .csv and .tsv are called "0", "1", ..., and quotes mean nothing in .tsv.
    With `names` the classes of hub datasets are their names instead of numbers.

    bad_rows: "fail" stops at the first bad row with a UserError; "skip" leaves bad rows out; "replace" mends
    what can be mended (U+FFFD for bytes that are no UTF-8 and for NULs, over-long lines of .txt cut) and
    leaves out the rest. Nothing is dropped or mended without being tallied in `counts`. A `document` is a run
    of lines between blank lines in .txt, and one record everywhere else.
    """
    return _read(data, columns, bad_rows, counts, text=False, header=header, names=names)


def read_texts(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> Iterator[Row]:
    """`read_rows`, but every row has a string that is not blank in "text"; blank rows are tallied, no error.

    Where no column is called "text", the only column of strings is taken, and `counts.notes` says so.
    """
    return _read(data, columns, bad_rows, counts, text=True)


def stored_bytes(data: DataLike) -> int:
    """About how much text the files of `data` hold, by their sizes on the disk; 0 for what is no file or folder."""
    if not isinstance(data, str | Path) or str(data).startswith(HUB):
        return 0
    packed = {path: ending(path)[1] or ending(path)[0] == ".parquet" for path in find_files(data)[0]}
    return sum(path.stat().st_size * (PACKED if small else 1) for path, small in packed.items())


def _read(
    data: DataLike,
    columns: Mapping[str, str] | None,
    bad_rows: str,
    counts: Counts | None,
    text: bool,
    header: bool = True,
    names: bool = False,
) -> Iterator[Row]:
    if bad_rows not in get_args(BadRows):
        known = ", ".join(get_args(BadRows))
        raise UserError(f"must be one of {known}, not {bad_rows!r}", where="--bad-rows")
    tally = counts if counts is not None else Counts()
    rows, used, size, document = tally.rows, tally.used, tally.bytes, -1
    for file, unit, items in _sources(data, tally, header, names):
        renamed: dict[str, str] = {}
        fresh = True
        for item in items:
            if isinstance(item, Header):
                renamed = _choose_columns(item, columns or {}, text, file, tally)
                continue
            if item.part > 1 and bad_rows == "skip":
                continue  # the first piece was rejected for the whole line
            tally.rows += 1
            fresh |= item.fresh
            values, problems = item.values, [item.problem] if item.problem else []
            if values is not None:
                values, more = inspect(values, renamed, text)
                problems += [more] if more else []
            if problems:
                values = settle(values, problems, bad_rows, f"{file}, {unit} {item.number:,}", tally)
            if values is not None:
                document += fresh
                fresh = False
                tally.used += 1
                yield Row(values, file, item.number, document)
    if tally.used == used:
        if tally.bytes == size:
            raise UserError("is empty", where=_name(data), fix="give a file with one text a line")
        raise nothing_usable(data, tally, tally.rows - rows, "text" if text else "row")


def _sources(data: DataLike, tally: Counts, header: bool, class_names: bool) -> Iterator[tuple[str, str, Items]]:
    """For each file: its name, what a row of it is called, and its items."""
    if isinstance(data, str) and data.startswith(HUB):
        tally.files.append(data)
        yield data, "row", hub(data, tally.add, class_names)
    elif isinstance(data, (str, Path)):
        found, ignored = find_files(data)
        tally.ignored += ignored
        if ignored:
            names = short_list([Path(name).name for name in ignored])
            tally.notes.append(f"{data}: {len(ignored):,} files that hold no data were ignored: {names}")
        for path in found:
            tally.files.append(str(path))
            form, before = ending(path)[0], tally.bytes
            unit = "line" if form in (".txt", ".jsonl") else "row"
            reader = formats.READERS[form] if header or form not in formats.DELIMITED else formats.numbered
            yield str(path), unit, reader(path, tally.add)
            if tally.bytes == before and len(found) > 1:
                tally.notes.append(f"{path}: is empty")
    elif isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray)):
        yield "the list", "item", formats.listed(data, tally.add)
    else:
        raise UserError(f"data must be a path or a list of strings or dicts, not {type(data).__name__}")


def _name(data: DataLike) -> str:
    return str(data) if isinstance(data, (str, Path)) else "the list"


def nothing_usable(data: DataLike, tally: Counts, rows: int, noun: str) -> UserError:
    """The error of data that has rows, but none that can be used."""
    details = [f"{n:,} x {name}: {'; '.join(tally.examples[name])}" for name, n in tally.rejected.items()]
    fix = next(filter(None, tally.fixes.values()), "give a file with one text a line")
    return UserError(f"has no usable {noun}: 0 of {rows:,} rows", where=_name(data), details=details, fix=fix)


def _choose_columns(header: Header, columns: Mapping[str, str], text: bool, file: str, tally: Counts) -> dict[str, str]:
    """{new name: old name}, after a check that every old name is there and that "text" is settled."""
    found = "found " + short_list([repr(name[:40]) for name in header.names], most=20)
    for new, old in columns.items():
        if old not in header.names:
            expected = ", ".join(map(repr, columns.values()))
            what = f"expected columns {expected}, {found}{did_you_mean(old, header.names)}"
            raise UserError(what, where=file, fix=f"--columns {new}=NAME, with a NAME that the file has")
    renamed = dict(columns)
    if text and "text" not in columns and ("text" not in header.names or "text" in columns.values()):
        if len(header.texts) != 1:
            what = f"expected a column 'text', {found}{did_you_mean('text', header.names)}"
            name = header.texts[0] if header.texts else "NAME"
            raise UserError(what, where=file, fix=f"--columns text=NAME, for example --columns text={name[:40]}")
        renamed["text"] = header.texts[0]
        tally.notes.append(f"{file}: took the column {header.texts[0]!r} as the text")
    return renamed


def settle(
    values: dict[str, Any] | None, problems: list[Problem], bad_rows: str, place: str, tally: Counts
) -> dict[str, Any] | None:
    """What becomes of a bad row: the mended values, or None for a rejected one, tallied; or a UserError."""
    for problem in problems:
        if bad_rows == "fail" and problem.reason != BLANK.reason:
            where = f"{place} ({problem.at})" if problem.at else place
            raise UserError(problem.what, where=where, fix=problem.fix)
    if bad_rows == "skip" or values is None:
        tally.note(tally.rejected, problems[0 if bad_rows == "skip" else -1], place)
        return None
    for problem in problems:
        tally.note(tally.replaced, problem, place)
    return values


def inspect(
    values: dict[str, Any], renamed: dict[str, str], text: bool
) -> tuple[dict[str, Any] | None, Problem | None]:
    """The values under their new names, and what is wrong with them (then None, or the mended values)."""
    needed = ({"text": "text", **renamed} if renamed else TEXT) if text else renamed
    for old in needed.values():  # plain loops: they are run for every row of a file
        if old not in values:
            return None, Problem("no column", f"has no {old!r}{did_you_mean(old, list(values))}")
    if renamed:
        kept = {name: value for name, value in values.items() if name not in renamed.values()}
        values = kept | {new: values[old] for new, old in renamed.items()}
    if text:
        value = values["text"]
        if value is None or (isinstance(value, str) and not value.strip()):
            return None, BLANK
        if not isinstance(value, str):
            what = f"has {type(value).__name__} where a text must stand"
            return None, Problem("not text", what)
    for value in values.values():
        if not (isinstance(value, str) and value.isascii() and "\0" not in value):
            break
    else:
        return values, None  # the usual case, fast
    try:
        return _mend(values)
    except RecursionError:
        return None, Problem("too deep", "is nested too deeply")


def _mend(value: Any) -> tuple[Any, Problem | None]:
    """The value without NULs and lone surrogates, which no tokenizer takes, and the problem if it had any."""
    if isinstance(value, str):
        fix = "--bad-rows replace (puts U+FFFD for each) or --bad-rows skip (leaves such rows out)"
        problem = None
        if "\0" in value:
            value, problem = value.replace("\0", "\ufffd"), Problem("NUL", "has a NUL character", fix=fix)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                what = f"has half a surrogate pair (\\u{ord(value[error.start]):04x}), which is no character"
                value = value.encode(errors="surrogatepass").decode(errors="replace")
                problem = problem or Problem("lone surrogate", what, fix=fix)
        return value, problem
    if isinstance(value, Mapping):
        pairs = {key: _mend(each) for key, each in value.items()}
        return {key: v for key, (v, _) in pairs.items()}, next((p for _, p in pairs.values() if p), None)
    if isinstance(value, list):
        parts = [_mend(each) for each in value]
        return [v for v, _ in parts], next((p for _, p in parts if p), None)
    return value, None
