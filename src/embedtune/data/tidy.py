"""A cleaned copy of a file: without repeats, near repeats and rows that cannot be used, each of them counted.

The data is read twice: once to see what repeats, once to write. Between the two only hashes and numbers are kept, no
texts, and these in files without a name beside the output (see `near`): memory does not depend on the number of rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from embedtune import files
from embedtune.data import pairs
from embedtune.data.clean import words_hash
from embedtune.data.lines import Problem, ending
from embedtune.data.near import leaders_on_disk
from embedtune.data.read import EXAMPLES, BadRows, Counts, DataLike, Row, place
from embedtune.data.scratch import READ, Column, Numbers, blocks
from embedtune.data.shingles import Shingler
from embedtune.data.sides import Judged, Source, check_near, outside, same_again
from embedtune.errors import UserError, short_list

WRITTEN = (".txt", ".jsonl", ".csv", ".tsv")
EXACT, NEAR = "exact repeat", "near repeat"
VERDICTS = ("label", *pairs.SYNONYMS["score"])  # columns that should agree where the texts do


@dataclass(frozen=True)
class Cleaned:
    """What `clean` did: rows == kept + sum(dropped.values())."""

    out: str
    rows: int
    kept: int
    documents: int
    dropped: dict[str, int]
    replaced: dict[str, int]
    examples: dict[str, list[str]]
    compared: list[str]
    near: float | None
    bytes: int
    sha256: str
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        near = f"nearly when their 3-word shingles overlap by {self.near:g} or more" if self.near else "near ones stay"
        lines = [f"read        {self.rows:,} rows", f"compared    by {', '.join(self.compared)}; {near}"]
        for head, counted in (("dropped", self.dropped), ("mended", self.replaced)):
            for reason, count in counted.items():
                more = "; ..." if count > len(self.examples[reason]) else ""
                lines.append(f"{head:<11} {count:,} {reason}: {'; '.join(self.examples[reason])}{more}")
        lines.append(f"kept        {self.kept:,} rows, {self.documents:,} documents")
        lines += [f"note        {note}" for note in self.notes]
        return [*lines, f"written     {self.out}, {self.bytes:,} bytes"]


def clean(
    data: DataLike,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    near: float | None = 0.8,
    drop_empty: bool = False,
    force: bool = False,
) -> Cleaned:
    """Write `data` to `out` (.txt, .jsonl, .csv, .tsv) without rows that repeat an earlier one, exactly or nearly.

    Of each cluster the first row stays; rows of several texts repeat each other when each text does. `near` is the
    Jaccard overlap of 3-word shingles from which texts are near (None: exact repeats only). Rows with an empty cell,
    and pairs of a text with itself, stay unless `drop_empty`. Raises UserError before anything is written, and `out`
    appears whole or not at all.
    """
    out = Path(out)
    form = _check_out(data, out, force)
    check_near(near)
    source, counts = Source(data, columns or {}, bad_rows, drop_empty), Counts()
    if form == ".txt":
        _need_one_text(source, out)
    seen = _survey(source, counts, near, out.parent)
    notes = list(counts.notes)
    if not drop_empty:
        kept = [
            f"{many:,} rows kept: {reason}; --drop-empty leaves them out" for reason, many in source.useless.items()
        ]
        notes += kept
    again = Counts()
    with files.growing(out) as file:
        writer = Writer(form, list(source.others), file)
        for number, judged in enumerate(source.rows(again)):
            if seen.stays(number, judged.row, counts):
                writer.add(judged)
        same_again(data, counts, again)
    if seen.contrary:
        notes.append(f"{seen.contrary:,} of the rows dropped have another label or score than the row they repeat")
    return Cleaned(
        out=str(out),
        rows=counts.rows,
        kept=writer.rows,
        documents=writer.documents,
        dropped=counts.rejected,
        replaced=counts.replaced,
        examples={reason: counts.examples[reason] for reason in (*counts.rejected, *counts.replaced)},
        compared=source.names,
        near=near,
        bytes=out.stat().st_size,
        sha256=files.sha256(out),
        notes=notes + writer.notes(),
    )


def _check_out(data: DataLike, out: Path, force: bool) -> str:
    """The format that the name asks for; a UserError where it cannot be written there."""
    form, packing = ending(out)
    if form not in WRITTEN or packing:
        what = f"cannot be written; known are {', '.join(WRITTEN)}"
        raise UserError(what, where=str(out), fix="give --out one of these endings")
    if out.is_dir() or (out.exists() and not force):
        raise UserError("exists already", where=str(out), fix="name another file, or --force")
    if not out.parent.is_dir():
        raise UserError("its folder does not exist", where=str(out), fix="make the folder, or name another")
    outside(data, out)
    return form


def _need_one_text(source: Source, out: Path) -> None:
    """Look at the first row, and refuse where a line has no room for its texts."""
    next(iter(source.rows(Counts())))
    source.useless.clear()
    if len(source.names) > 1:
        what = f"a .txt holds one text a line, these rows have {' and '.join(source.names)}"
        raise UserError(what, where=str(out), fix="--out with the ending .jsonl, .csv or .tsv")


@dataclass
class _Seen:
    """What is known of each row: the row that stays in its place, a hash of its texts, and one of its verdicts."""

    leader: Column
    exact: Numbers
    verdicts: Column
    contrary: int = 0
    places: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {True: 0, False: 0}
        for first, leader, away, exact in self._blocks():
            for kind in found:  # those that will be examples
                shown = leader[away[exact == kind]][: EXAMPLES - found[kind]]
                self.places.update(dict.fromkeys(shown.tolist(), ""))
                found[kind] += len(shown)
            mine = self.verdicts[first : first + len(leader)][away]
            self.contrary += int((self.verdicts.take(leader[away]) != mine).sum())
        self.ahead = self._fates()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each block of rows the first, the leaders, which rows do not stay, and whether these equal theirs."""
        for first, leader in blocks(self.leader):
            away = np.flatnonzero(leader != np.arange(first, first + len(leader)))
            exact = self.exact.take(leader[away]) == self.exact[first : first + len(leader)][away]
            yield first, leader, away, exact

    def _fates(self) -> Iterator[tuple[int, str]]:
        """Of each row its leader, and why it does not stay ("" where it does)."""
        for _, leader, away, exact in self._blocks():
            reasons = [""] * len(leader)
            for row, equal in zip(away.tolist(), exact.tolist()):
                reasons[row] = EXACT if equal else NEAR
            yield from zip(leader.tolist(), reasons)

    def stays(self, number: int, row: Row, counts: Counts) -> bool:
        """Whether a row is kept, asked of one after the other; if not, it is tallied."""
        leader, reason = next(self.ahead, (-1, ""))
        if leader < 0:
            return False  # the file has grown: `same_again` says so
        if number in self.places:
            self.places[number] = place(row)
        if not reason:
            return True
        counts.used -= 1
        there = self.places.get(leader, "").removeprefix(f"{row.file}, ")
        counts.note(counts.rejected, Problem(reason, reason, fix=""), f"{place(row)} (as {there})")
        return False


def _survey(source: Source, counts: Counts, near: float | None, folder: Path) -> _Seen:
    """Read all rows and find out which repeat an earlier one."""
    shingler, verdicts, silent = Shingler(folder), Column(np.uint64, folder), words_hash([])
    some: list[int] = []
    for judged in source.rows(counts):
        shingler.add(["\n".join(cell) for cell in (*judged.sides, *judged.negatives)])
        found = [str(judged.row.values[name]) for name in VERDICTS if name in judged.row.values]
        some.append(words_hash(found) if found else silent)
        if len(some) == READ:
            verdicts.append(np.array(some, np.uint64))
            some = []
    verdicts.append(np.array(some, np.uint64))
    sets = shingler.done()
    return _Seen(leaders_on_disk(sets, near), sets.exact, verdicts)


class Writer:
    """Writes rows in the format of an ending; `names` are the columns of .csv and .tsv."""

    def __init__(self, form: str, names: list[str], file: BinaryIO) -> None:
        self.form, self.names, self.file = form, names, file
        self.rows = self.documents = self.joined = 0
        self.last: int | None = None
        self.left: dict[str, None] = {}  # columns that the format has no room for
        self.types: dict[str, None] = {}  # of values that are written as text
        self.buffer = io.StringIO()
        self.table = csv.writer(self.buffer, delimiter="\t" if form == ".tsv" else ",")
        if form in (".csv", ".tsv"):
            self._record(names)

    def add(self, judged: Judged) -> None:
        """Write one row."""
        row = judged.row
        fresh = row.document != self.last
        if self.form == ".txt":
            text = " ".join(judged.sides[0])
            self.joined += "\n" in text or "\r" in text
            self.left.update(dict.fromkeys(row.values))
            self._put(("\n" if fresh and self.rows else "") + re.sub(r"[\r\n]+", " ", text))
        elif self.form == ".jsonl":
            self._put(json.dumps(row.values, ensure_ascii=False, default=self._plain))
        else:
            self._record([self._cell(row.values.get(name)) for name in self.names])
        self.rows, self.documents, self.last = self.rows + 1, self.documents + fresh, row.document

    def _record(self, cells: list[str]) -> None:
        self.buffer.seek(0)
        self.buffer.truncate()
        self.table.writerow(cells)
        # It ends in CRLF, for then the csv module puts quotes around a cell with either.
        self._put(self.buffer.getvalue().removesuffix("\r\n"))

    def _cell(self, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return json.dumps(value, ensure_ascii=False, default=self._plain)

    def _plain(self, value: Any) -> str:
        self.types[type(value).__name__] = None
        return str(value)

    def _put(self, line: str) -> None:
        if line.startswith("\ufeff") and not self.file.tell():
            line = "\ufeff" + line  # one at the start of a file is taken for a mark, not for text
        # A column's name may hold half a surrogate pair; in JSON that is written as \ud800.
        self.file.write((line + "\n").encode("utf-8", "backslashreplace"))

    def notes(self) -> list[str]:
        """What the format could not keep."""
        notes = []
        if self.joined:
            notes.append(f"{self.joined:,} texts had line ends in them, which are blanks now")
        if len(self.left) > 1:
            notes.append(
                f"a .txt has no room for columns: of {short_list(list(self.left), 10)} only the text was written"
            )
        if self.types:
            notes.append(f"values of the types {', '.join(self.types)} were written as text")
        return notes
