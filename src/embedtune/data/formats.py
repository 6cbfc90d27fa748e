"""Lines to records: one generator for each format, each blind to policies.

A bad row carries its `Problem` and, where it can be mended, the mended values; `read` decides what
becomes of it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedtune import files
from embedtune.data import lines as text_lines
from embedtune.data.lines import Line, Problem, decode, ending, unpacked, unpacked_text
from embedtune.errors import UserError

PARQUET_ROWS = 256
DELIMITED = (".csv", ".tsv")  # whose cells are all strings
BLANK = Problem("blank", "is blank", fix="")


class Header(NamedTuple):
    """The columns of a file, known before its first item; `texts` are those that hold strings."""

    names: list[str]
    texts: list[str]


class Item(NamedTuple):
    """One record, good or bad; `values` is None where there is nothing to mend."""

    number: int
    values: dict[str, Any] | None
    problem: Problem | None = None
    fresh: bool = True  # begins a document
    part: int = 0  # 1, 2, ...: a piece of an over-long line


Add = Callable[[bytes], None]
Items = Iterator[Header | Item]


def _lines(path: Path, add: Add) -> Iterator[Line]:
    return text_lines.lines(unpacked_text(path, add))


def txt(path: Path, add: Add) -> Items:
    """One text a line; a document begins with the file and after blank lines."""
    yield Header(["text"], ["text"])
    fresh = True
    for line in _lines(path, add):
        text, problem = decode(line, path)
        if problem is None and (not text or text.isspace()):
            yield Item(line.number, None, BLANK)
            fresh = True
        else:
            yield Item(line.number, {"text": text}, problem, fresh, line.part)
            fresh = False


def jsonl(path: Path, add: Add) -> Items:
    """One JSON object a line, or one JSON string, which is a text. The first object gives the columns."""
    first = True
    for line in _lines(path, add):
        if line.part > 1:
            continue
        text, problem = decode(line, path)
        values = None
        if not line.part and not text.strip():
            problem = problem or BLANK
        elif not line.part:
            values, wrong = _parse_json(text, path)
            problem = problem or wrong
        if values is not None and first:
            yield _header(values)
            first = False
        yield Item(line.number, values, problem)


def _header(values: Mapping[str, Any]) -> Header:
    return Header(list(values), [name for name, value in values.items() if isinstance(value, str)])


def _parse_json(text: str, path: Path) -> tuple[dict[str, Any] | None, Problem | None]:
    fix = "put one JSON object on each line; or leave such lines out with --bad-rows skip"
    array = f"if the file is one JSON array: jq -c '.[]' {path.name} > FIXED.jsonl"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg} at column {error.colno:,})"
        return None, Problem("not JSON", what, fix=array if text.strip() == "[" else fix)
    except RecursionError:
        return None, Problem("too deep", "is nested too deeply", fix=fix)
    except ValueError:
        return None, Problem("not JSON", "has a number of too many digits", fix=fix)
    if isinstance(value, str):
        return {"text": value}, None
    if not isinstance(value, dict):
        what = f"is a JSON {type(value).__name__}, not an object or a string"
        return None, Problem("no object", what, fix=array if isinstance(value, list) else fix)
    return value, None


def delimited(path: Path, add: Add) -> Items:
    """CSV or TSV as in RFC 4180 with a header; quoted cells may hold line ends."""
    header: list[str] | None = None
    number = 0
    for cells, problem, at in _delimited_records(path, add):
        if header is None:
            header = _check_header(cells, problem, path)
            yield Header(header, header)
            continue
        number += 1
        if cells == []:
            cells, problem = None, problem or BLANK
        elif cells is not None and len(cells) != len(header):
            what = f"has {len(cells):,} cells, the header has {len(header):,}"
            cells, problem = None, problem or Problem("ragged", what)
        values = None if cells is None else dict(zip(header, cells))
        yield Item(number, values, problem and problem._replace(at=", ".join(filter(None, (at, problem.at)))))


def numbered(path: Path, add: Add) -> Items:
    """`delimited` without a header: columns are "0", "1", ..., so many as a row has; in .tsv quotes mean nothing."""
    first = True
    for number, (cells, problem, at) in enumerate(_delimited_records(path, add, quotes=ending(path)[0] != ".tsv"), 1):
        values = {str(place): cell for place, cell in enumerate(cells)} if cells else None
        if values and first:
            yield _header(values)
            first = False
        problem = problem or (BLANK if cells == [] else None)
        yield Item(number, values, problem and problem._replace(at=", ".join(filter(None, (at, problem.at)))))


def _delimited_records(
    path: Path, add: Add, quotes: bool = True
) -> Iterator[tuple[list[str] | None, Problem | None, str]]:
    """Each record's cells, its first problem, and the line or lines it stands on, in words."""
    csv.field_size_limit(2**31 - 1)  # process-wide, so generous: it is the record's size that is limited
    lines = _lines(path, add)
    first = last = size = 0  # of the record: its lines and bytes
    problem: Problem | None = None
    over = done = False

    def next_line() -> str | None:
        nonlocal first, last, size, problem, over, done
        line = next((line for line in lines if line.part < 2), None)
        if line is None:
            done = True
            return None
        first, last, size = first or line.number, line.number, size + len(line.data)
        text, wrong = decode(line, path)
        problem = problem or wrong
        over = size > text_lines.MAX_LINE_BYTES
        if over or line.part:
            raise csv.Error("too long")
        return text + "\n"

    delimiter = "\t" if ending(path)[0] == ".tsv" else ","
    records = csv.reader(
        iter(next_line, None),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        first = last = size = 0
        problem, cells = None, None
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if done or over:
                what = "a cell in quotes begins here and does not end; all that follows would be lost in it"
                fix = 'close the quote ("), or write "" for a quote that is part of the text'
                raise UserError(what, where=f"{path}, line {first:,}", fix=fix) from error
            problem = problem or Problem("not CSV", f"has a quote out of place ({error})")
        yield cells, problem, f"line {first:,}" if first == last else f"lines {first:,} to {last:,}"


def _check_header(cells: list[str] | None, problem: Problem | None, path: Path) -> list[str]:
    where = f"{path}, header"
    if problem or not cells:
        fix = problem.fix if problem else "begin the file with a line of column names"
        raise UserError(problem.what if problem else "is blank", where=where, fix=fix)
    twice = [name for name, times in Counter(cells).items() if times > 1]
    if twice:
        fix = "give each column its own name"
        raise UserError(f"names {min(twice)[:40]!r} more than once", where=where, fix=fix)
    if len(cells) == 1:
        check_parted(cells[0], where)
    return cells


def check_parted(cell: str, where: str) -> None:
    """Raise UserError where the only cell of a record looks like several, parted by a sign of another format."""
    names = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}  # what texts hold the most comes last
    if sign := next((sign for sign in names if sign in cell), None):
        fix = "tabs go with the ending .tsv, commas with .csv; save other files anew with commas"
        raise UserError(f"{cell[:40]!r} is one column: are cells parted by {names[sign]}?", where=where, fix=fix)


def parquet(path: Path, add: Add) -> Items:
    """Apache Parquet, a few rows at a time; a packed file is unpacked to the disk first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with files.scratch() as copy:
        packed = bool(ending(path)[1])
        for chunk in unpacked(path, add):
            if packed:
                copy.write(chunk)
        try:
            file = pq.ParquetFile(copy if packed else path)
            schema = file.schema_arrow
            yield Header(schema.names, [f.name for f in schema if f.type in (pa.string(), pa.large_string())])
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for values, problem in _batch_rows(batch):
                    number += 1
                    yield Item(number, values, problem)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is not UTF-8
            what = f"is damaged or no parquet file ({(str(error).splitlines() or [''])[0][:200]})"
            raise UserError(what, where=str(path), fix="copy it again, or write it anew") from error


def _batch_rows(batch: Any) -> list[tuple[dict[str, Any] | None, Problem | None]]:
    try:
        return [(values, None) for values in batch.to_pylist()]
    except (UnicodeDecodeError, ValueError, OverflowError):
        if batch.num_rows > 1:  # one by one: the bad cell must not take its neighbours along
            return [_batch_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
        return [(None, Problem("not UTF-8", "has a cell that is not UTF-8 or cannot be read"))]


def listed(data: Sequence[str | Mapping[str, Any]], add: Add) -> Items:
    """Python strings (texts) and dicts (rows); each is its own document."""
    first = True
    for number, item in enumerate(data, 1):
        try:
            add(json.dumps(item, default=str).encode() + b"\n")
        except (RecursionError, TypeError, ValueError):
            yield Item(number, None, Problem("no data", "is circular or nested too deeply"))
            continue
        if isinstance(item, Mapping) and not all(isinstance(name, str) for name in item):
            yield Item(number, None, Problem("no data", "is a dict with a key that is no string"))
            continue
        if not isinstance(item, (str, Mapping)):
            what = f"is neither a string nor a dict, but {type(item).__name__}"
            yield Item(number, None, Problem("no data", what))
            continue
        values = {"text": item} if isinstance(item, str) else dict(item)
        if first:
            yield _header(values)
            first = False
        yield Item(number, values)


READERS: dict[str, Callable[[Path, Add], Items]] = {
    ".txt": txt,
    ".jsonl": jsonl,
    ".csv": delimited,
    ".tsv": delimited,
    ".parquet": parquet,
}
