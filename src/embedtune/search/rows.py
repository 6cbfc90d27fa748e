"""Rows with an id, a text and other columns, for embedding and for the index."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from embedtune.data.named import find_column
from embedtune.data.read import BadRows, Counts, place, read_texts
from embedtune.errors import UserError

IDS = ("id", "_id", "doc_id", "docid", "document_id", "key")
STDIN = "-"


class Record(NamedTuple):
    """A text, its id (a column, else the number of its line or row) and what else the row holds."""

    id: str
    text: str
    columns: dict[str, Any]
    numbered: bool = False  # the id is such a number


def read_records(data: str, columns: Mapping[str, str], bad_rows: BadRows, counts: Counts) -> Iterator[Record]:
    """The rows of a file or folder that hold a text; "-" reads lines from stdin. A column `title` is not joined."""
    if data == STDIN:
        yield from _lines(counts)
        return
    alone = Path(data).is_file()  # of several files the row numbers collide: then the texts are counted
    for count, row in enumerate(read_texts(data, columns=columns, bad_rows=bad_rows, counts=counts), 1):
        text = row.values["text"]
        name = find_column(IDS, list(row.values))
        found = row.values[name] if name else None
        numbered = found in (None, "")
        others = {k: v for k, v in row.values.items() if k not in ("text", name)}
        if wrong := [k for k in others if not k.isascii() and k.encode(errors="replace").decode() != k]:
            what = f"half a surrogate pair stands in the name of the column {ascii(wrong[0][:40])}"
            raise UserError(what, where=place(row), fix="give the column another name")
        yield Record(str((row.number if alone else count) if numbered else found), text, others, numbered)


def _lines(counts: Counts) -> Iterator[Record]:
    for number, line in enumerate(sys.stdin, 1):
        counts.rows += 1
        if text := line.strip():
            counts.used += 1
            yield Record(str(number), text, {}, True)
        else:
            counts.rejected["blank"] = counts.rejected.get("blank", 0) + 1
