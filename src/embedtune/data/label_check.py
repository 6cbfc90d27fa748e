"""The doctor for labels: reads labelled, graded or tagged data, lists what is wrong or would make training worse."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from embedtune.data.check import (
    FEW_ROWS,
    MANY_DUPLICATES,
    MANY_LONG,
    MANY_NEAR,
    NEAR_CHARACTERS,
    NEAR_ROWS,
    Measure,
    Remark,
    error_parts,
    row_remarks,
)
from embedtune.data.clean import words_hash
from embedtune.data.doctors import NEAR, Places, Scores, Side, SideTally, scores_of, unknown_remarks, unknown_share
from embedtune.data.hub import HUB
from embedtune.data.label_report import ClassCount, LabelDiagnosis, LabelKind
from embedtune.data.labels import (
    GRADED,
    LABELLED,
    Census,
    Graded,
    Labelled,
    in_order,
    read_graded,
    read_labelled,
    shown,
)
from embedtune.data.lines import ending, find_files
from embedtune.data.named import find_column, finite, name_of
from embedtune.data.near import leaders
from embedtune.data.read import EXAMPLES, Counts, DataLike, read_rows
from embedtune.data.shingles import sets_of
from embedtune.data.tags import TAGGED, Scheme, Tagged, check_tags, is_conll, place_in, read_tagged, scheme_of, spans
from embedtune.errors import UserError, short_list

LOOKED_AT = 1000  # rows by which the kind of data is told
FRACTIONS = 0.1  # share of fractions that makes a column of numbers one of scores
MANY_TIMES, MOST = 10, 0.8  # the commonest class: so many times the rarest, such a share of the rows
# Up to so many rows of the class in the middle, and in all, `run` tunes on pairs first (benchmarks/few_labels.py).
FEW_A_CLASS, FEW_IN_ALL = 16, 1000
FAR = 0.2  # share of the range by which scores of one text contradict each other


def kind_of_labels(data: DataLike, columns: Mapping[str, str] | None = None) -> LabelKind | None:
    """What the columns make of the data, None where there are no labels; UserError where it cannot be read at all.

    A column of numbers is one of scores where it goes by such a name, or where more than a few are fractions.
    """
    given = dict(columns or {})
    kinds: dict[str, LabelKind] = {"tokens": "tagged", "tags": "tagged", "score": "graded", "label": "labelled"}
    if asked := [kind for our, kind in kinds.items() if our in given]:
        return asked[0]
    if isinstance(data, (str, Path)) and Path(data).is_dir():
        data = find_files(data)[0][0]
    if is_conll(data):
        return "tagged"
    rows = [row.values for row in islice(read_rows(data, bad_rows="skip"), LOOKED_AT)]
    there = list(rows[0])
    tokens, tags = (find_column(TAGGED[our], there) for our in ("tokens", "tags"))
    if tokens and tags and isinstance(rows[0][tokens], list | tuple):
        return "tagged"
    if not (given.get("text") or find_column(LABELLED["text"], there)):
        return None
    label, score = find_column(LABELLED["label"], there), find_column(GRADED["score"], there)
    if label is not None:
        return "graded" if _fractions([row.get(label) for row in rows]) > FRACTIONS else "labelled"
    return "graded" if score is not None and any(finite(row.get(score)) is not None for row in rows) else None


def candidates(data: DataLike, columns: Mapping[str, str] | None = None) -> list[str]:
    """The columns that could hold the labels, scores or tags; the one that the user named, where one is named."""
    given = dict(columns or {})
    if asked := [given[our] for our in ("label", "score", "tags") if our in given]:
        return asked
    if is_conll(data) or (isinstance(data, (str, Path)) and Path(data).is_dir()):
        return []
    rows = [row.values for row in islice(read_rows(data, bad_rows="skip"), LOOKED_AT)]
    tagged, known = set(TAGGED["tags"]), {*LABELLED["label"], *TAGGED["tags"]}
    lists = find_column(TAGGED["tokens"], list(rows[0])) is not None
    found = []
    for name in rows[0]:
        low, cells = name.casefold(), [row.get(name) for row in rows]
        is_score = low in GRADED["score"] and any(finite(cell) is not None for cell in cells)
        if name not in given.values() and (low in tagged if lists else low in known or is_score):
            found.append(name)
    return found


def _fractions(cells: Sequence[Any]) -> float:
    """The share of fractions among cells that hold numbers, 0 where one holds something else."""
    numbers = [finite(cell) for cell in cells if cell is not None and cell != ""]
    fractions = sum(number is not None and not number.is_integer() for number in numbers)
    return 0.0 if None in numbers else fractions / max(len(numbers), 1)


@dataclass
class _Found:
    """What one pass gathers: for each row a hash, an answer (its score, or a code of its labels), and its place."""

    side: SideTally = field(default_factory=lambda: SideTally("rows"))
    answers: array[float] = field(default_factory=lambda: array("d"))
    codes: dict[Hashable, int] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    first: list[list[str]] = field(default_factory=list)
    census: Census = field(default_factory=Census)
    sentences: list[Tagged] = field(default_factory=list)  # without their tokens
    types: Counter[str] = field(default_factory=Counter)
    paired: bool = False
    without: int = 0
    candidates: list[str] = field(default_factory=list)  # columns that could hold the answers

    def add(self, row: Labelled | Graded | Tagged, measure: Measure, special: int) -> None:
        """Take one row; `special` is how many tokens are added to a pair."""
        cells = [" ".join(row.tokens)] if isinstance(row, Tagged) else [row.text, *([row.pair] if row.pair else [])]
        if len(cells) > 1:
            self.paired, measure.special = True, special
        self.side.add(" ".join(cells), measure)
        self.answers.append(self._answer(row))
        if len(self.first) < NEAR_ROWS:
            self.first.append([cell[:NEAR_CHARACTERS] for cell in cells])
        self.places.add(row.file, row.number)

    def _answer(self, row: Labelled | Graded | Tagged) -> float:
        if isinstance(row, Graded):
            return row.score
        if isinstance(row, Labelled):
            self.census.add(row)
            self.without += not row.labels
            return self.codes.setdefault(frozenset(row.labels), len(self.codes))
        entities = spans(row.tags)
        self.types.update(kind for kind, _, _ in entities)
        self.without += not entities
        self.sentences.append(Tagged((), row.tags, row.file, row.number))
        return self.codes.setdefault(words_hash(row.tags), len(self.codes))

    def likeness(self, row: int, other: int) -> str:
        """Where two rows stand that are alike."""
        (file, number), there = self.places.at(row), place_in(*self.places.at(other))
        return f"{place_in(file, number)} is like {there.removeprefix(f'{file}, ')}"


def check_labels(
    data: DataLike,
    kind: LabelKind,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> LabelDiagnosis:
    """Examine data of a kind (`kind_of_labels`) without stopping at bad rows.

    tokenizer: a Hugging Face fast tokenizer. max_length: in tokens, special ones included (words without a tokenizer).
    Raises UserError only where there is nothing to examine: no such file, no known ending, no fast tokenizer. In
    memory stand about 40 bytes a row, and the tags.
    """
    measure, counts, found, fatal = Measure(tokenizer), Counts(), _Found(), []
    special = tokenizer.num_special_tokens_to_add(pair=True) if tokenizer is not None else 0
    sources: list[Any] = [data]
    if isinstance(data, (str, Path)) and not str(data).startswith(HUB) and not is_conll(data):
        sources, counts.ignored = find_files(data)
    for source in sources:
        try:
            for row in _read(source, kind, columns, counts):
                found.add(row, measure, special)
        except UserError as error:
            fatal.append(error)
    with suppress(UserError):  # what cannot be read stands in `fatal`
        found.candidates = candidates(data, columns)
    return _diagnose(kind, found, counts, fatal, measure, max_length, name_of(data))


def _read(
    source: DataLike, kind: LabelKind, columns: Mapping[str, str] | None, counts: Counts
) -> Iterator[Labelled] | Iterator[Graded] | Iterator[Tagged]:
    if kind == "labelled":
        return read_labelled(source, columns=columns, bad_rows="skip", counts=counts)
    if kind == "graded":
        return read_graded(source, columns=columns, bad_rows="skip", counts=counts)
    return read_tagged(source, columns=columns, bad_rows="skip", counts=counts)


def _diagnose(
    kind: LabelKind,
    found: _Found,
    counts: Counts,
    fatal: list[UserError],
    measure: Measure,
    limit: int | None,
    where: str,
) -> LabelDiagnosis:
    used = len(found.answers)
    side, repeats, classes = found.side.done(measure, limit), _repeats(kind, found), _classes(kind, found)
    scheme = scheme_of(row.tags for row in found.sentences) if kind == "tagged" else None
    scores = None
    if kind == "graded" and used:
        scores = scores_of(np.array(found.answers), found.places)
    stops = [Remark(*error_parts(error)) for error in fatal]
    if used or not stops:
        stops += _stops(kind, found, scheme, where)
    unknown = unknown_share([found.side], measure)
    remarks = list(stops)
    if used:
        remarks += _doubtful(found.candidates) + row_remarks(counts) + _imbalance(kind, classes)
        remarks += _remarks(kind, side, repeats, unknown, scores)
        if kind == "labelled" and not found.census.multi and not found.paired:
            remarks += _few_a_class(classes)
    return LabelDiagnosis(
        verdict="not usable" if stops else "usable, with remarks" if remarks else "ready",
        kind=kind,
        remarks=remarks,
        formats=sorted({"".join(ending(Path(file))) for file in counts.files}) or ["list"],
        files=len(counts.files),
        bytes=counts.bytes,
        sha256=counts.sha256,
        rows=counts.rows,
        used=counts.used,
        rejected=counts.rejected,
        examples={reason: counts.examples[reason] for reason in counts.rejected},
        paired=found.paired,
        multi=found.census.multi,
        classes=classes,
        without=found.without,
        scheme=scheme,
        scores=scores,
        lengths=side.lengths,
        cut=side.cut,
        unknown_share=unknown,
        exact_duplicates=repeats.exact,
        near_duplicates=repeats.near,
        near_duplicates_rows=len(found.first),
        conflicts=repeats.conflicts,
        conflict_examples=repeats.examples,
        across=repeats.across,
        notes=counts.notes,
    )


def _classes(kind: LabelKind, found: _Found) -> list[ClassCount]:
    many: Mapping[str, int] = found.types if kind == "tagged" else found.census.counts
    total = found.types.total() if kind == "tagged" else found.census.rows
    return [ClassCount(name, many[name], many[name] / total) for name in in_order(many)]


class _Repeats(NamedTuple):
    """Rows that repeat an earlier one, exactly and nearly, and how many of them contradict it."""

    exact: int
    near: int
    conflicts: int
    examples: list[str]
    across: int


def _repeats(kind: LabelKind, found: _Found) -> _Repeats:
    """Exact ones among all rows, near ones among the first; tags are compared only where the tokens are the same."""
    _, first, inverse = np.unique(np.array(found.side.hashes, np.uint64), return_index=True, return_inverse=True)
    rows, like = np.arange(len(inverse)), first[inverse]
    exact, near = like != rows, np.zeros(len(rows), bool)
    leader, some = leaders(sets_of(found.first), NEAR), slice(len(found.first))
    near[some] = (leader != rows[some]) & ~exact[some]
    like[near] = leader[near[some]]
    answers = np.array(found.answers)
    gap = FAR * np.ptp(answers) if kind == "graded" and len(rows) else 0
    against = np.abs(answers - answers[like]) > gap
    compared = exact if kind == "tagged" else exact | near
    conflicts = np.flatnonzero(compared & against)
    examples = [found.likeness(row, int(like[row])) for row in conflicts[:EXAMPLES].tolist()]
    files = np.array(found.places.files, np.int64)
    across = int((files != files[like]).sum())
    return _Repeats(int(exact.sum()), int(near.sum()), len(conflicts), examples, across)


def _stops(kind: LabelKind, found: _Found, scheme: Scheme | None, where: str) -> list[Remark]:
    """What training would refuse."""
    try:
        if kind == "labelled":
            found.census.classes(where)
        elif kind == "graded" and len(set(found.answers)) < 2:
            raise UserError("fewer than two different scores: there is nothing to learn", where=where)
        elif scheme is not None:
            check_tags(found.sentences, scheme, where)
            if not found.types:
                raise UserError("has no tag but O: there is nothing to learn", where=where)
    except UserError as error:
        return [Remark(*error_parts(error))]
    return []


def _doubtful(names: Sequence[str]) -> list[Remark]:
    """A remark where more than one column could hold the labels."""
    if len(names) < 2:
        return []
    what = f"{len(names)} columns could hold the labels or scores: {short_list(list(map(repr, names)), most=6)}"
    return [Remark(what, f"say which one: --columns label={names[0]}, or score=NAME")]


def _imbalance(kind: LabelKind, classes: list[ClassCount]) -> list[Remark]:
    """Classes, or types of entities, some of which are learned at the expense of others."""
    if len(classes) < 2:
        return []
    common, rare = (choose(classes, key=lambda each: each.count) for choose in (max, min))
    remarks, noun = [], "entities" if kind == "tagged" else "rows"
    if common.count > MANY_TIMES * rare.count:
        what = f"{shown(common.name)} has {common.count / rare.count:.0f} times as many {noun} as {shown(rare.name)}"
        fix = "give more of the rare ones, or weight the classes in training; judge by macro F1"
        remarks.append(Remark(f"{what} ({common.count:,} and {rare.count:,})", fix))
    if kind == "labelled" and common.share > MOST:
        what = f"{common.share:.0%} of the rows are {shown(common.name)}: to say so always is right as often"
        remarks.append(Remark(what, "judge by balanced accuracy, F1 or MCC, not by accuracy"))
    return remarks


def few(rows: Sequence[int]) -> bool:
    """Whether classes of so many rows are learned best by pairs of their rows first."""
    return median(rows) <= FEW_A_CLASS and sum(rows) <= FEW_IN_ALL


def _few_a_class(classes: list[ClassCount]) -> list[Remark]:
    """A remark where another way than tuning on the labels alone is better."""
    middle = median(each.count for each in classes) if classes else 0
    if middle <= 1 or not few([each.count for each in classes]):
        return []
    fix = "embedtune run FILE tunes the encoder on pairs of the labels first: the best way with so few (docs/labels.md)"
    return [Remark(f"{middle:g} rows a class, in the middle of the classes: few", fix)]


def _remarks(
    kind: LabelKind, side: Side, repeats: _Repeats, unknown: float | None, scores: Scores | None
) -> list[Remark]:
    """What training would take, but should not have to."""
    remarks = []
    cleaning = "leave the repeats out" if kind == "tagged" else "embedtune data clean FILE --out NEW"
    if side.texts < FEW_ROWS:
        remarks.append(Remark(f"only {side.texts:,} rows: too few to learn much from", "give some hundreds of rows"))
    if repeats.conflicts:
        what = f"{repeats.conflicts:,} rows repeat an earlier one, exactly or nearly, but not its label"
        fix = "settle which label is right, or leave such rows out"
        remarks.append(Remark(f"{what}: {'; '.join(repeats.examples)}", fix))
    if repeats.across:
        what = f"{repeats.across:,} rows repeat a row of another file, exactly or nearly: a score on it would flatter"
        remarks.append(Remark(what, "embedtune data split --by cluster makes parts that share no text"))
    if repeats.exact > MANY_DUPLICATES * side.texts:
        what = f"{repeats.exact:,} rows ({repeats.exact / side.texts:.1%}) repeat an earlier one"
        remarks.append(Remark(what, cleaning))
    if repeats.near > MANY_NEAR * min(side.texts, NEAR_ROWS):
        what = f"{repeats.near:,} of the first {min(side.texts, NEAR_ROWS):,} rows nearly repeat an earlier one"
        remarks.append(Remark(what, cleaning))
    remarks += scores.outside() if scores else []
    remarks += unknown_remarks(unknown)
    if side.lengths and side.lengths.longer > MANY_LONG * side.texts:
        n = side.lengths
        what = f"{n.longer:,} rows ({n.longer / side.texts:.0%}) are longer than {n.limit:,} {n.unit}"
        remarks.append(Remark(f"{what}: {side.cut:.0%} of all {n.unit} would be cut", "give shorter texts"))
    return remarks
