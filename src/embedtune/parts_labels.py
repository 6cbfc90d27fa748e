"""What a run on labels trains on, chooses on and is judged on: three parts of each class that share no text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.data.clean import text_hash
from embedtune.data.columns import parse_columns
from embedtune.data.divide import joined, leaks, text_groups
from embedtune.data.kinds import WORDS
from embedtune.data.label_check import candidates, check_labels
from embedtune.data.label_report import LabelKind
from embedtune.data.labels import Graded, Labelled, classes_of, drop_singles, read_graded, read_labelled
from embedtune.data.read import Counts
from embedtune.data.stratify import stratified
from embedtune.data.tags import Tagged, check_tags, drop_invalid, read_tagged, scheme_of, spans, to_bio
from embedtune.errors import UserError, short_list
from embedtune.fit.prepared import data_profile, name_of, rows_lost
from embedtune.recipes import Run

TASKS: dict[LabelKind, str] = {"labelled": "classify", "graded": "regress", "tagged": "tag"}
TEST, DEV = 0.2, 0.1  # shares to judge and to choose on, of which the recipe bounds the rows
FEWEST = 40  # rows, without which nothing can be proved
BINS = 5  # of scores: each part has as many low, middling and high ones
UNUSED = ("adapt", "pairs", "most_pairs", "negatives", "dims", "test_corpus")  # fields that say nothing of labels

Row = Labelled | Graded | Tagged


@dataclass(frozen=True)
class LabelParts:
    """Rows to train on, to choose on and to judge on, as the readers of labels take them."""

    task: str
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]
    profile: dict[str, Any]
    remarks: list[str]
    sha256: str


def divide_labels(recipe: Run, kind: LabelKind, note: Callable[[str], None]) -> LabelParts:
    """Read the data and part it. Raises UserError where it is too little, or where several columns may be meant."""
    columns, name = parse_columns(recipe.columns), name_of(recipe.data)
    _refuse_unused(recipe)
    there = candidates(recipe.data, columns)
    if len(there) > 1:
        what = f"{len(there)} columns could hold the labels or scores: {short_list(list(map(repr, there)), most=6)}"
        fix = f"say which one: --columns label={there[0]}, or score=NAME (--labels False reads raw text)"
        raise UserError(what, where=name, fix=fix)
    note(f"reading {name} as {WORDS[kind]}")
    counts = Counts()
    rows, remarks = _read(recipe, kind, columns, counts)
    if len(rows) < FEWEST:
        raise UserError(f"{len(rows)} rows: too little data to prove anything", where=name, fix="give some hundreds")
    texts, strata = [_text(row) for row in rows], _strata(kind, rows)
    part = _apart(texts, strata, _shares(recipe, len(rows)), recipe.loop.seed)
    train, dev, test = ([_plain(row) for row, p in zip(rows, part) if p == number] for number in range(3))
    if min(len(dev), len(test)) < 2:
        what = f"hangs together: {len(dev)} rows to choose on and {len(test)} to judge on, in whole near-repeats"
        raise UserError(what, where=name, fix="give more varied data")
    remarks.append(
        f"{len(rows):,} rows parted by class, near-duplicates together: {len(train):,} to train on, {len(dev):,} to "
        f"choose on, {len(test):,} to judge on; no text is in two parts, exactly or nearly"
    )
    if scarce := int(((strata[part == 0].sum(0) > 0) & (strata[part == 2].sum(0) == 0)).sum()):
        remarks.append(f"{scarce:,} classes are too rare to be judged: they stand in training only")
    diagnosis = check_labels(recipe.data, kind, columns=columns)
    remarks += [f"the doctor says: {remark.what}" for remark in diagnosis.remarks]
    sizes = {"train_rows": len(train), "dev_rows": len(dev), "test_rows": len(test)}
    many = {f"{'type' if kind == 'tagged' else 'class'} {c.name}": c.count for c in diagnosis.classes[:12]}
    profile = {**data_profile(recipe.data, counts, None), "rows": len(rows), **sizes,
               "classes": len(diagnosis.classes) or None, **many}  # fmt: skip
    return LabelParts(TASKS[kind], train, dev, test, profile, remarks, counts.sha256)


def _refuse_unused(recipe: Run) -> None:
    plain = Run()
    if odd := [name for name in UNUSED if getattr(recipe, name) != getattr(plain, name)]:
        what = f"{', '.join(odd)}: of no use for data with labels"
        raise UserError(what, where=name_of(recipe.data), fix="leave it out, or read raw text with --labels False")


def _read(recipe: Run, kind: LabelKind, columns: dict[str, str], counts: Counts) -> tuple[list[Any], list[str]]:
    """The distinct rows that can be learned from, and what was left out."""
    given: Any = {"columns": columns, "bad_rows": recipe.bad_rows, "counts": counts}
    name, skip = name_of(recipe.data), recipe.bad_rows == "skip"
    scheme = None
    if kind == "labelled":
        rows: list[Any] = list(read_labelled(recipe.data, **given))
    elif kind == "graded":
        rows = list(read_graded(recipe.data, **given))
    else:
        rows = list(read_tagged(recipe.data, **given))
        scheme = scheme_of(row.tags for row in rows)
        rows = drop_invalid(rows, scheme, counts) if skip else rows
        check_tags(rows, scheme, name)
        rows = [dataclasses.replace(row, tags=to_bio(row.tags, scheme)) for row in rows]
    rows, repeats, contrary = _distinct(rows)
    if kind == "labelled":
        rows = drop_singles(rows, counts) if skip else rows
        classes_of(rows, name)
    remarks = rows_lost(counts)
    if scheme not in (None, "BIO"):
        remarks.append(f"the tags are {scheme}: read as BIO, which the model and its scores speak")
    if repeats:
        remarks.append(
            f"{repeats:,} rows left out: they repeat an earlier one; {contrary:,} of them have another label"
        )
    return rows, remarks


def _distinct(rows: Sequence[Any]) -> tuple[list[Any], int, int]:
    """The first of all rows with a text, how many repeat one, and how many of those say something else of it."""
    kept: dict[int, Any] = {}
    contrary = 0
    for row in rows:
        first = kept.setdefault(text_hash(_text(row)), row)
        contrary += _answer(first) != _answer(row)
    return list(kept.values()), len(rows) - len(kept), contrary


def _text(row: Row) -> str:
    if isinstance(row, Tagged):
        return " ".join(row.tokens)
    return row.text if row.pair is None else f"{row.text}\n{row.pair}"


def _answer(row: Row) -> Any:
    return row.tags if isinstance(row, Tagged) else row.score if isinstance(row, Graded) else row.labels


def _strata(kind: LabelKind, rows: Sequence[Any]) -> np.ndarray:
    """(n, C) int64: how often each class, type of entity or fifth of the scores stands in a row; last, the row."""
    if kind == "graded":
        ranks = np.argsort(np.argsort([row.score for row in rows], kind="stable"), kind="stable")
        counts = np.eye(BINS, dtype=np.int64)[ranks * BINS // len(rows)]
    else:
        found = [[name for name, _, _ in spans(row.tags)] if kind == "tagged" else row.labels for row in rows]
        place = {name: n for n, name in enumerate(dict.fromkeys(name for names in found for name in names))}
        counts = np.zeros((len(rows), len(place)), np.int64)
        for number, names in enumerate(found):
            np.add.at(counts[number], [place[name] for name in names], 1)
    return np.hstack([counts, np.ones((len(rows), 1), np.int64)])


def _shares(recipe: Run, rows: int) -> tuple[float, float]:
    return min(DEV, recipe.test_rows / rows), min(TEST, recipe.test_rows / rows)


def _apart(texts: Sequence[str], strata: np.ndarray, shares: tuple[float, float], seed: int) -> np.ndarray:
    """(n,) 0, 1, 2: parts of the rows, in whole groups of texts that repeat each other exactly or nearly."""
    groups = text_groups(texts)
    while True:
        part, edges = stratified(strata, groups, shares, seed), []
        for number in (1, 2):
            here, there = np.flatnonzero(part == number), np.flatnonzero(part < number)
            found = leaks([texts[row] for row in there.tolist()], [texts[row] for row in here.tolist()])
            edges.append(np.stack([here[found.rows], there[found.where]], axis=1))
        if not len(both := np.concatenate(edges)):
            return part
        # Only where near-repeats were too many to follow all: what the comparison found is one group after all.
        groups = joined(groups, both)


def _plain(row: Row) -> dict[str, Any]:
    if isinstance(row, Tagged):
        return {"tokens": list(row.tokens), "tags": list(row.tags)}
    pair = {} if row.pair is None else {"text_pair": row.pair}
    if isinstance(row, Graded):
        return {"text": row.text, **pair, "score": row.score}
    return {"text": row.text, **pair, "label": list(row.labels) if row.multi else row.labels[0]}
