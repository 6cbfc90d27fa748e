"""Pairs in: anchors with positives and negatives, and scored sentence pairs, by the names of their columns.

Order never decides. A column is found by its own name, by a synonym, or by what `columns` says; anything else is an
error that lists what is there. Cells that cannot be used are collected over the whole file and said once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedtune.data.lines import SKIP, Problem
from embedtune.data.read import BadRows, Counts, DataLike, Row, read_rows
from embedtune.data.retrieval import is_beir, read_beir
from embedtune.errors import UserError, did_you_mean, short_list

# The first name of each is ours; the rest is how others call it.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "anchor": ("anchor", "query", "question", "claim", "anchors", "queries", "questions"),
    "positive": (
        *("positive", "positives", "passage", "answer", "context", "document", "pos", "response"),
        *("positive_passage", "passages", "answers", "documents"),
    ),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives", "negative_passage"),
    "sentence1": ("sentence1", "sentence_1", "sentence_A", "text1", "s1", "premise"),
    "sentence2": ("sentence2", "sentence_2", "sentence_B", "text2", "s2", "hypothesis"),
    "score": ("score", "similarity", "label", "similarity_score", "relatedness_score"),
    "group": ("group",),
}
NUMBERED = re.compile(r"(.+?)[_ -]?\d+$")
DROP = "embedtune data clean FILE --drop-empty --out NEW, or --bad-rows skip leaves such rows out"
SHOWN = 3
LIST = "the list"
SAME = "the anchor is one of its own positives or negatives"


@dataclass(frozen=True, slots=True)
class Pair:
    """One anchor with one of its positives; `number` is the row of `file` it stands in."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    file: str
    number: int
    group: str | None


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """Two texts and how similar they are; `score` is None where the file has none."""

    sentence1: str
    sentence2: str
    score: float | None
    file: str
    number: int


@dataclass
class _Wrong:
    """Rows that cannot be used, by what is wrong with them."""

    found: dict[str, list[str]] = field(default_factory=dict)
    many: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, place: str) -> None:
        self.many[what] = self.many.get(what, 0) + 1
        if len(places := self.found.setdefault(what, [])) <= SHOWN:
            places.append(place)

    def refuse(self, where: str, rows: int) -> None:
        if not self.many:
            return
        details = [f"{what} ({n:,} of {rows:,} rows): {short_list(self.found[what])}" for what, n in self.many.items()]
        fix = DROP if any(what == SAME or what.endswith("is empty") for what in self.many) else SKIP
        raise UserError(f"{sum(self.many.values()):,} rows cannot be used", where=where, details=details, fix=fix)


def read_pairs(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
    split: str = "train",
) -> Iterator[Pair]:
    """Stream pairs out of a file, a list of dicts, `hub:NAME` or a BEIR folder (then the judgements of `split`).

    A cell with a list of positives gives a pair each; negatives may be any number of columns (negative,
    negative_1, ...) or a list. With bad_rows="fail" the rows that cannot be used are named together in one UserError
    after the last row; "skip" and "replace" leave them out and count them.
    """
    tally = counts if counts is not None else Counts()
    if isinstance(data, (str, Path)) and is_beir(data):
        yield from _beir_pairs(data, split, bad_rows, tally)
        return
    needs = _rename(columns, ("anchor", "positive", "negative", "group"))
    for row, cells in _named(data, needs, ("anchor", "positive"), bad_rows, tally):
        group = cells.get("group")
        yield from (
            Pair(cells["anchor"][0], positive, tuple(cells["negative"]), row.file, row.number, group)
            for positive in cells["positive"]
        )


def read_scored(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> Iterator[ScoredPair]:
    """Stream scored sentence pairs; where the file has no score column every score is None.

    Pairs may also come under the names of `read_pairs` (anchor, positive), since a file of pairs without scores is
    one of those. A score that is no finite number makes its row unusable.
    """
    tally = counts if counts is not None else Counts()
    needs = _rename(columns, ("sentence1", "sentence2", "score"))
    for row, cells in _named(data, needs, ("sentence1", "sentence2"), bad_rows, tally):
        yield ScoredPair(cells["sentence1"][0], cells["sentence2"][0], cells["score"], row.file, row.number)


def _beir_pairs(folder: str | Path, split: str, bad_rows: BadRows, tally: Counts) -> Iterator[Pair]:
    found = read_beir(folder, split, bad_rows=bad_rows, counts=tally)
    tally.notes += found.remarks
    file, wrong, number = str(Path(folder) / "qrels" / f"{split}.tsv"), _Wrong(), 0
    for query, judged in found.qrels.items():
        for document in (name for name, relevance in judged.items() if relevance > 0):
            number += 1
            anchor, positive = found.queries[query], found.corpus[document]
            if anchor != positive:
                yield Pair(anchor, positive, (), file, number, query)
                continue
            tally.used -= 1
            wrong.add(SAME, f"query {query}")
            tally.note(tally.rejected, Problem(SAME, SAME, fix=DROP), f"{file}, query {query}")
    if bad_rows == "fail":
        wrong.refuse(file, number)


def _rename(columns: Mapping[str, str] | None, ours: Sequence[str]) -> dict[str, str]:
    """The user's own names for our columns; a UserError for a column that is not ours."""
    given = dict(columns or {})
    if unknown := [name for name in given if name not in ours]:
        raise UserError(
            f"{unknown[0]!r} is no column of ours{did_you_mean(unknown[0], list(ours))}; there are {', '.join(ours)}",
            where="--columns",
        )
    return {name: given.get(name, "") for name in ours}


def _named(
    data: DataLike, ours: Mapping[str, str], must: Sequence[str], bad_rows: BadRows, tally: Counts
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows with their cells under our names; what cannot be used is counted, or refused together at the end."""
    wrong, first = _Wrong(), tally.rows
    file, there = None, []
    named: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for row in read_rows(data, bad_rows=bad_rows, counts=tally):
        if row.file != file:
            file, there = row.file, list(row.values)
            names = named = _find_columns(there, ours, must, file, tally)
        elif list(row.values) != there:
            # A record of other keys: of JSON, or a dict. What it lacks is an empty cell.
            there = list(row.values)
            names = {our: matches(our, given, there) or named[our] for our, given in ours.items()}
        cells, what = _cells(row, names, must)
        if what is None:
            yield row, cells
            continue
        tally.used -= 1
        place = f"{row.file}, row {row.number:,}"
        wrong.add(what, place if str(data) != row.file and row.file != LIST else f"row {row.number:,}")
        tally.note(tally.rejected, Problem(what, what, fix=DROP), place)
    if bad_rows == "fail":
        wrong.refuse(str(data) if isinstance(data, (str, Path)) else LIST, tally.rows - first)


def _find_columns(
    there: list[str], ours: Mapping[str, str], must: Sequence[str], file: str, tally: Counts
) -> dict[str, list[str]]:
    """For each of our columns the file's columns that hold it; a UserError where one that must be there is not."""
    found = {our: matches(our, given, there) for our, given in ours.items()}
    if must[0] == "sentence1" and not (found["sentence1"] or found["sentence2"]):
        found |= {"sentence1": matches("anchor", "", there), "sentence2": matches("positive", "", there)}
    listed = short_list([repr(name[:40]) for name in there], most=20)
    for our in must:
        if found[our]:
            continue
        asked = ours[our] or our
        near = did_you_mean(asked, there) or did_you_mean(our, there)
        example = next((name for name in there if not any(name in names for names in found.values())), "NAME")
        raise UserError(
            f"expected columns {', '.join(map(repr, must))}, found {listed}{near}: no column {asked!r}",
            where=file,
            fix=f"--columns {our}=NAME, for example --columns {our}={example}",
        )
    for our, given in ours.items():
        if given and given not in there:
            raise UserError(f"has no column {given!r}{did_you_mean(given, there)}, found {listed}", where=file)
        if found[our] and found[our][0] != our and not given and our != "negative":
            tally.notes.append(f"{file}: took the column {found[our][0]!r} as {our!r}")
    return found


def matches(our: str, given: str, there: list[str]) -> list[str]:
    """The columns of `there` that hold `our`: the `given` one, else all negatives, or the first synonym in the list."""
    if given:
        return [given] if given in there else []
    kinds = {synonym.casefold(): place for place, synonym in enumerate(SYNONYMS[our])}
    if our == "negative":
        return [name for name in there if {low := name.casefold(), NUMBERED.sub(r"\1", low)} & set(kinds)]
    known = [name for name in there if name.casefold() in kinds]
    return sorted(known, key=lambda name: kinds[name.casefold()])[:1]


def _cells(row: Row, names: Mapping[str, list[str]], must: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The row's cells under our names, and what makes it unusable (then in a few words, and no cells)."""
    out: dict[str, Any] = {}
    for our, theirs in names.items():
        if our == "score":
            out[our], what = _score(row.values.get(theirs[0])) if theirs else (None, None)
        elif our == "group":
            group = row.values.get(theirs[0]) if theirs else None
            out[our], what = None if group is None else str(group), None
        else:
            out[our], what = _texts([(name, row.values.get(name)) for name in theirs], our in must)
            if what is None and our not in ("positive", "negative") and len(out[our]) > 1:
                what = f"column {theirs[0]!r} holds a list"
        if what is not None:
            return {}, what
    if must[0] == "anchor" and set(out["anchor"]) & {*out["positive"], *out["negative"]}:
        return {}, SAME
    return out, None


def _texts(cells: list[tuple[str, Any]], needed: bool) -> tuple[list[str], str | None]:
    texts: list[str] = []
    for name, value in cells:
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is None or (isinstance(item, str) and not item.strip()):
                if needed:
                    return [], f"column {name!r} is empty"
            elif not isinstance(item, str):
                return [], f"column {name!r} holds {type(item).__name__} where a text must stand"
            else:
                texts.append(item)
    return (texts, None) if texts or not needed else ([], f"column {cells[0][0]!r} is empty")


def _score(value: Any) -> tuple[float | None, str | None]:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    return (number, None) if math.isfinite(number) else (None, "the score is no finite number")
