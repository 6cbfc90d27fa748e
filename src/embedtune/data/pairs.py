"""Pairs in: anchors with positives and negatives, and scored sentence pairs, by the names of their columns.

Order never decides. A column is found by its own name, by a synonym, or by what `columns` says; anything else is an
error that lists what is there. Cells that cannot be used are collected over the whole file and said once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedtune.data.lines import Problem
from embedtune.data.named import Named, Wrong, finite, name_of, named, refuse, unusable, usable
from embedtune.data.read import BadRows, Counts, DataLike, Row, read_rows
from embedtune.data.retrieval import is_beir, read_beir
from embedtune.data.votes import votes_as_pairs

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
PAIRED = {"anchor": SYNONYMS["anchor"], "positive": SYNONYMS["positive"], "negative": (), "group": ("group",)}
SCORED = {our: SYNONYMS[our] for our in ("sentence1", "sentence2", "score")}
AS_PAIRS = {"sentence1": SYNONYMS["anchor"], "sentence2": SYNONYMS["positive"]}
NUMBERED = re.compile(r"(.+?)[_ -]?\d+$")
DROP = "embedtune data clean FILE --drop-empty --out NEW, or --bad-rows skip leaves such rows out"
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
    after the last row; "skip" and "replace" leave them out and count them. A file of votes on search results, as
    `embedtune serve` writes it, gives the pairs of data/votes.py.
    """
    tally = counts if counts is not None else Counts()
    if isinstance(data, (str, Path)) and is_beir(data):
        yield from _beir_pairs(data, split, bad_rows, tally)
        return
    rows = votes_as_pairs(read_rows(data, bad_rows=bad_rows, counts=tally), tally)
    found = named(rows, PAIRED, ("anchor", "positive"), columns, tally)
    for pairs in usable(_pairs(found), name_of(data), bad_rows, tally):
        yield from pairs


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
    rows = read_rows(data, bad_rows=bad_rows, counts=tally)
    found = named(rows, SCORED, ("sentence1", "sentence2"), columns, tally, otherwise=AS_PAIRS)
    yield from usable(_scored(found), name_of(data), bad_rows, tally)


def _beir_pairs(folder: str | Path, split: str, bad_rows: BadRows, tally: Counts) -> Iterator[Pair]:
    found = read_beir(folder, split, bad_rows=bad_rows, counts=tally)
    tally.notes += found.remarks
    file, wrong, number = str(Path(folder) / "qrels" / f"{split}.tsv"), Wrong(), 0
    for query, judged in found.qrels.items():
        for document in (name for name, relevance in judged.items() if relevance > 0):
            number += 1
            anchor, positive = found.queries[query], found.corpus[document]
            if anchor != positive:
                yield Pair(anchor, positive, (), file, number, query)
                continue
            tally.used -= 1
            wrong.add(SAME, f"query {query}")
            tally.note(tally.rejected, unusable(SAME, DROP), f"{file}, query {query}")
    if bad_rows == "fail":
        refuse(wrong, f"{wrong.many.get(SAME, 0):,} of {number:,} judgements cannot be used", file, [DROP])


def _pairs(rows: Iterable[Named]) -> Iterator[tuple[Row, tuple[Pair, ...] | list[Problem]]]:
    before: dict[str, str] | None = None
    others: list[str] = []  # the columns of negatives
    for row, cells, names in rows:
        if names is not before:  # other columns
            before, others = names, _negatives(row, names)
        anchor, problem = _text(cells["anchor"], names["anchor"])
        positives, wrong = _texts([(names["positive"], cells["positive"])])
        negatives, strange = _texts([(name, row.values.get(name)) for name in others], needed=False)
        problem = problem or wrong or strange
        if problem is None and anchor in (*positives, *negatives):
            problem = unusable(SAME, DROP)
        group = None if cells.get("group") is None else str(cells["group"])
        made = (Pair(anchor, positive, tuple(negatives), row.file, row.number, group) for positive in positives)
        yield row, [problem] if problem else tuple(made)


def _negatives(row: Row, names: Mapping[str, str]) -> list[str]:
    if "negative" in names:
        return [names["negative"]]
    return [name for name in matches("negative", "", list(row.values)) if name not in names.values()]


def _scored(rows: Iterable[Named]) -> Iterator[tuple[Row, ScoredPair | list[Problem]]]:
    for row, cells, names in rows:
        first, problem = _text(cells["sentence1"], names["sentence1"])
        second, wrong = _text(cells["sentence2"], names["sentence2"])
        score = finite(cells.get("score"))
        problem = problem or wrong
        if "score" in names and score is None:
            problem = problem or unusable("the score is no finite number")
        yield row, [problem] if problem else ScoredPair(first, second, score, row.file, row.number)


def matches(our: str, given: str, there: list[str]) -> list[str]:
    """The columns of `there` that hold `our`: the `given` one, else all negatives, or the first synonym in the list."""
    if given:
        return [given] if given in there else []
    kinds = {synonym.casefold(): place for place, synonym in enumerate(SYNONYMS[our])}
    if our == "negative":
        # A name may have 100,000 letters, and the search for its number tries each as the beginning.
        short = [name for name in there if len(name) <= 40]
        return [name for name in short if {low := name.casefold(), NUMBERED.sub(r"\1", low)} & set(kinds)]
    known = [name for name in there if name.casefold() in kinds]
    return sorted(known, key=lambda name: kinds[name.casefold()])[:1]


def _text(cell: Any, name: str) -> tuple[str, Problem | None]:
    """The one text of a cell, and what makes it unusable."""
    texts, problem = _texts([(name, cell)])
    if problem is None and len(texts) > 1:
        problem = unusable(f"column {name!r} holds a list")
    return texts[0] if texts else "", problem


def _texts(cells: list[tuple[str, Any]], needed: bool = True) -> tuple[list[str], Problem | None]:
    """The texts of named cells, and what makes them unusable; where none is `needed`, empty ones are passed over."""
    texts: list[str] = []
    for name, value in cells:
        several = value if isinstance(value, list | tuple) else [value]
        for item in several or ([None] if needed else []):
            if item is None or (isinstance(item, str) and not item.strip()):
                if needed:
                    return [], unusable(f"column {name!r} is empty", DROP)
            elif not isinstance(item, str):
                return [], unusable(f"column {name!r} holds {type(item).__name__} where a text must stand")
            else:
                texts.append(item)
    return texts, None
