"""Rows and the texts in them: which columns hold the texts, and what of a row cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from embedtune.data import pairs
from embedtune.data.clean import text_hash
from embedtune.data.lines import Problem
from embedtune.data.read import BadRows, Counts, DataLike, Row, place, read_rows
from embedtune.data.retrieval import is_beir
from embedtune.errors import UserError, did_you_mean, short_list

KNOWN = ("text", "tokens", "label", *pairs.SYNONYMS)
MOST_COLUMNS = 10_000
BLANK, EMPTY, SAME = "blank", "empty cell", "same text on both sides"


class Judged(NamedTuple):
    """A row, the texts by which it is compared (a list for each column), and those of its negatives."""

    row: Row
    sides: list[list[str]]
    negatives: list[list[str]]


@dataclass
class Source:
    """Rows of any data with the texts in them; reading twice gives the same rows twice.

    The texts are the columns anchor and positive, or sentence1 and sentence2, or text, by any of their names; where
    there are none of these, all columns that hold strings. `useless` counts rows with an empty cell, and pairs of an
    anchor with itself, by reason; they are left out where `drop_empty`.
    """

    data: DataLike
    columns: Mapping[str, str]
    bad_rows: BadRows = "fail"
    drop_empty: bool = False
    names: list[str] = field(default_factory=list)  # of the first file's texts
    others: dict[str, None] = field(default_factory=dict)  # all its columns, in order
    useless: dict[str, int] = field(default_factory=dict)
    are_pairs: bool = False  # whether the texts are anchor and positive

    def __post_init__(self) -> None:
        for our in self.columns:
            if our not in KNOWN:
                what = f"{our!r} is no column of ours{did_you_mean(our, KNOWN)}; there are {', '.join(KNOWN)}"
                raise UserError(what, where="--columns")

    def rows(self, counts: Counts) -> Iterator[Judged]:
        """The usable rows; the rest is tallied in `counts`, or is a UserError where bad rows fail."""
        if isinstance(self.data, (str, Path)) and is_beir(self.data):
            fix = "clean corpus.jsonl alone; the parts of such a folder are the files in its qrels"
            raise UserError("is a BEIR folder, not one table", where=str(self.data), fix=fix)
        file = None
        sides: list[str] = []
        negatives: list[str] = []
        for row in read_rows(self.data, bad_rows=self.bad_rows, counts=counts):
            if row.file != file:
                file = row.file
                sides, negatives = self._choose(row, counts)
            self.others.update(dict.fromkeys(row.values))
            if len(self.others) > MOST_COLUMNS:
                raise UserError(f"has more than {MOST_COLUMNS:,} columns: are the keys texts?", where=place(row))
            found = Judged(row, [texts(row, name) for name in sides], [texts(row, name) for name in negatives])
            if problem := self._problem(found, sides, counts):
                counts.used -= 1
                counts.note(counts.rejected, problem, place(row))
            else:
                yield found

    def _problem(self, found: Judged, names: list[str], counts: Counts) -> Problem | None:
        fix = "mend the row, or leave such rows out with --bad-rows skip"
        for name in names:
            if wrong := _wrong_type(found.row.values.get(name)):
                if self.bad_rows == "fail":
                    what = f"column {name!r} holds {wrong} where a text must stand"
                    raise UserError(what, where=place(found.row), fix=fix)
                return Problem("not text", f"holds {wrong}", fix=fix)
        if not any(found.sides):
            return Problem(BLANK, "is blank", fix="")
        same = self.are_pairs and text_hash("\n".join(found.sides[0])) == text_hash("\n".join(found.sides[1]))
        if all(found.sides) and not same:
            return None
        reason = SAME if same else EMPTY
        self.useless[reason] = self.useless.get(reason, 0) + 1
        return Problem(reason, reason, fix="") if self.drop_empty else None

    def _choose(self, row: Row, counts: Counts) -> tuple[list[str], list[str]]:
        """The file's columns of texts, and of negatives."""
        there = list(row.values)
        for new, old in self.columns.items():
            if old not in there:
                found = short_list([repr(name[:40]) for name in there], most=20)
                what = f"has no column {old!r}{did_you_mean(old, there)}, found {found}"
                raise UserError(what, where=row.file, fix=f"--columns {new}=NAME, with a NAME that the file has")
        sides, self.are_pairs = _sides(row, self.columns)
        if not sides:
            found = short_list([repr(name[:40]) for name in there], most=20)
            fix = "--columns text=NAME, or anchor=NAME,positive=NAME"
            raise UserError(f"has no column of texts, found {found}", where=row.file, fix=fix)
        if self.names and len(sides) != len(self.names):
            what = f"has {len(sides)} columns of texts, the files before it {len(self.names)}"
            raise UserError(what, where=row.file, fix="give files of one kind")
        self.names = self.names or sides
        if sides != ["text"]:
            counts.notes.append(f"{row.file}: rows are compared by {' and '.join(map(repr, sides))}")
        negatives = pairs.matches("negative", self.columns.get("negative", ""), there)
        return sides, [name for name in negatives if name not in sides]


def _sides(row: Row, columns: Mapping[str, str]) -> tuple[list[str], bool]:
    """The names of the columns that hold the row's texts, and whether these are anchor and positive."""
    there = list(row.values)
    for kind in (("anchor", "positive"), ("sentence1", "sentence2")):
        found = [pairs.matches(our, columns.get(our, ""), there)[:1] for our in kind]
        if any(our in columns for our in kind) and not all(found):
            our = kind[found.index([])]
            fix = f"--columns {our}=NAME, with a NAME that the file has"
            raise UserError(f"no column is called {our!r} or the like", where=row.file, fix=fix)
        if all(found) and "text" not in columns:
            return [name for names in found for name in names], kind[0] == "anchor"
    if "text" in columns or "text" in there:
        return [columns.get("text", "text")], False
    if "tokens" in there:
        return ["tokens"], False
    return [name for name, value in row.values.items() if isinstance(value, str)], False


def texts(row: Row, name: str) -> list[str]:
    """The texts in a cell that are not blank: one, or several where it is a list."""
    value = row.values.get(name)
    several = value if isinstance(value, list | tuple) else [value]
    return [text for text in several if isinstance(text, str) and text.strip()]


def _wrong_type(value: Any) -> str:
    """What stands in a cell that is neither empty, nor a text, nor a list of texts."""
    several = value if isinstance(value, list | tuple) else [value]
    return next((type(each).__name__ for each in several if each is not None and not isinstance(each, str)), "")


def outside(data: DataLike, out: Path) -> None:
    """Refuse to write into the folder that is read."""
    if isinstance(data, (str, Path)) and Path(data).is_dir() and Path(data).resolve() in (out / "x").resolve().parents:
        raise UserError("lies in the folder that is read", where=str(out), fix="name a place outside of it")


def check_near(near: float | None) -> None:
    """Refuse a threshold that is none."""
    if near is not None and not 0 < near <= 1:
        raise UserError(f"must be above 0 and at most 1, not {near:g}", where="--near", fix="--near 0.8")


def same_again(data: DataLike, first: Counts, second: Counts) -> None:
    """Refuse to go on where the second reading gave other content than the first."""
    if first.sha256 != second.sha256:
        name = str(data) if isinstance(data, (str, Path)) else "the list"
        raise UserError("changed while it was read", where=name, fix="run again when it is complete")
