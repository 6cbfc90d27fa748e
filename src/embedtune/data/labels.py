"""Labels in: texts with their classes, and texts with a score, by the names of their columns.

Order never decides: a column is found by its own name, by a synonym, or by what `columns` says. Cells that cannot be
used are collected over the whole file and said once; so is what is wrong with the classes as a whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from embedtune.data.formats import DELIMITED
from embedtune.data.lines import SKIP, Problem, ending
from embedtune.data.named import MOST_KINDS, Named, Wrong, finite, has_header, name_of, named, refuse, unusable, usable
from embedtune.data.pairs import DROP, SYNONYMS
from embedtune.data.read import BadRows, Counts, DataLike, Row, place_of, read_rows
from embedtune.errors import UserError, did_you_mean, short_list

# The first name of each is ours; the rest is how others call it.
PAIR = ("text_pair", *SYNONYMS["sentence2"], "question2")
TEXT = (
    *("text", *SYNONYMS["sentence1"], "question1", "sentence", "review", "content", "body", "question", "utterance"),
    *("query", "comment", "message", "tweet", "document", "title"),
)
LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "target", "topic")
SCORE = ("score", "stars", "rating", "grade", "similarity", "label", "value")
TEXTS = {"text": TEXT, "text_pair": PAIR, "group": ("group",)}
LABELLED = {**TEXTS, "label": LABEL}
GRADED = {**TEXTS, "score": SCORE}

DECIMAL = re.compile(r"\s*[+-]?\d+\.\d*\s*", re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
MISSING = unusable("no label", "give the row a label, or leave such rows out with --bad-rows skip")
TWICE = unusable("a label twice in one list")
FRACTION = unusable(
    "a fraction where a label must stand",
    "embedtune fit regress, where the numbers are grades; else write the labels as names",
)
LEAVE_OUT = "add rows of such labels to the training data, or leave them out here"
ALONE = unusable("a class with a single row")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or two, with its labels: one, or where `multi` any number; `number` is the row of `file`."""

    text: str
    pair: str | None
    labels: tuple[str, ...]
    file: str
    number: int
    group: str | None
    multi: bool = False


@dataclass(frozen=True, slots=True)
class Graded:
    """A text, or two, with a score; `number` is the row of `file` it stands in."""

    text: str
    pair: str | None
    score: float
    file: str
    number: int
    group: str | None


@dataclass(frozen=True)
class Classes:
    """The classes of a data set in their order, the rows of each, and whether a row may have several or none."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    multi: bool


def read_labelled(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> Iterator[Labelled]:
    """Stream labelled texts out of a file, a folder, a list of dicts or `hub:NAME`.

    Labels are strings in the end: 1 and 1.0 are "1", booleans "true" and "false"; a list means that several labels, or
    none, may hold. Cells of .csv and .tsv have no type, so those that look like decimals are read as such; strings of
    other formats stay as they are. Where `columns` are numbers, from 0, .csv and .tsv have no header. With
    bad_rows="fail" the rows that cannot be used are named together in one UserError after the last row; "skip" and
    "replace" leave them out and count them.
    """
    tally = counts if counts is not None else Counts()
    rows = read_rows(data, bad_rows=bad_rows, counts=tally, header=has_header(columns), names=True)
    found = named(rows, LABELLED, ("text", "label"), columns, tally)
    yield from usable(_labelled(found), name_of(data), bad_rows, tally)


def read_graded(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> Iterator[Graded]:
    """Stream texts with a score; a score that is no finite number makes its row unusable (see `read_labelled`)."""
    tally = counts if counts is not None else Counts()
    rows = read_rows(data, bad_rows=bad_rows, counts=tally, header=has_header(columns))
    found = named(rows, GRADED, ("text", "score"), columns, tally)
    yield from usable(_graded(found), name_of(data), bad_rows, tally)


def _labelled(rows: Iterable[Named]) -> Iterator[tuple[Row, Labelled | list[Problem]]]:
    form = _Form()
    for row, cells, names in rows:
        text, pair, problem = _texts(cells, names)
        labels, wrong = _labels(cells["label"], typed=ending(Path(row.file))[0] not in DELIMITED)
        multi = isinstance(cells["label"], list | tuple)
        problem = problem or wrong or form.differs(row.file, multi, pair is not None)
        made = Labelled(text, pair, labels, row.file, row.number, _group(cells), multi)
        yield row, [problem] if problem else made


def _graded(rows: Iterable[Named]) -> Iterator[tuple[Row, Graded | list[Problem]]]:
    form = _Form()
    for row, cells, names in rows:
        text, pair, problem = _texts(cells, names)
        score = finite(cells["score"])
        if score is None:
            problem = problem or unusable(f"column {names['score']!r} holds no finite number")
        problem = problem or form.differs(row.file, False, pair is not None)
        made = Graded(text, pair, score or 0.0, row.file, row.number, _group(cells))
        yield row, [problem] if problem else made


@dataclass
class _Form:
    """What the first usable row of a file looks like; the others must be of the same form."""

    file: str | None = None
    multi: bool = False
    paired: bool = False

    def differs(self, file: str, multi: bool, paired: bool) -> Problem | None:
        if file != self.file:
            self.file, self.multi, self.paired = file, multi, paired
        if multi != self.multi:
            what = "a list of labels, where the first row has one label"
            if self.multi:
                what = "one label, where the first row has a list of labels"
            return unusable(what, "make all of them lists, or none")
        if paired != self.paired:
            what = f"{'a' if paired else 'no'} second text, where the first row has {'none' if paired else 'one'}"
            return unusable(what, "give a second text in all rows, or in none")
        return None


def _texts(cells: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str | None, Problem | None]:
    """The row's text, its second text where it has one, and what is wrong with them."""
    for our in ("text", "text_pair"):
        value = cells.get(our)
        if our not in cells or (isinstance(value, str) and value.strip()):
            continue
        what, fix = f"column {names[our]!r} is empty", DROP
        if value is not None and not isinstance(value, str):
            what, fix = f"column {names[our]!r} holds {type(value).__name__} where a text must stand", SKIP
        return "", None, unusable(what, fix)
    return cells["text"], cells.get("text_pair"), None


def _group(cells: Mapping[str, Any]) -> str | None:
    group = cells.get("group")
    return None if group is None else str(group)


def _labels(value: Any, typed: bool) -> tuple[tuple[str, ...], Problem | None]:
    """A cell's labels, and what makes it unusable; decimals in strings are numbers unless cells are `typed`."""
    found = [_label(each, typed) for each in (value if isinstance(value, list | tuple) else [value])]
    labels = tuple(label for label in found if isinstance(label, str))
    wrong = next((label for label in found if isinstance(label, Problem)), None)
    return labels, wrong or (TWICE if len(set(labels)) < len(labels) else None)


def _label(value: Any, typed: bool) -> str | Problem:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if typed or not DECIMAL.fullmatch(value):
            return value if value.strip() else MISSING
        value = float(value)
    if value is None or (isinstance(value, Real) and value != value):  # tables write NaN where nothing is
        return MISSING
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        number = float(value)
        return str(int(number)) if number.is_integer() else FRACTION
    return unusable(f"{type(value).__name__} where a label must stand")


@dataclass
class Census:
    """The classes of rows that are taken one by one: how many rows each has, and where the first stands."""

    rows: int = 0
    multi: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, row: Labelled) -> None:
        """Take one row."""
        self.rows += 1
        self.multi |= row.multi
        for label in row.labels:
            if label not in self.first:
                self.first[label] = place_of(row.file, row.number)
            self.counts[label] = self.counts.get(label, 0) + 1

    def classes(self, where: str) -> Classes:
        """The classes; a UserError with all that makes them impossible to learn."""
        if not self.rows:
            raise UserError("has no rows", where=where, fix="give rows with a text and a label")
        problems = [*self._few(where), *self._alike(where)]
        if problems:
            details, fixes = zip(*problems)
            what = f"the labels of {self.rows:,} rows are not those of classes that can be learned"
            raise UserError(what, where=where, details=details, fix="; ".join(dict.fromkeys(fixes)))
        names = in_order(self.counts)
        return Classes(names, tuple(self.counts[name] for name in names), self.multi)

    def _few(self, where: str) -> Iterator[tuple[str, str]]:
        if len(self.counts) < 2:
            only = f"only one class, {shown(next(iter(self.counts)))}" if self.counts else "no class at all"
            yield only, "give rows of two classes or more"
        alone = [f"{shown(name)} ({self._at(name, where)})" for name, n in self.counts.items() if n == 1]
        if alone:
            what = f"{len(alone):,} class{'es' if len(alone) > 1 else ''} with a single row: {short_list(alone)}"
            yield what, "give each class two rows or more, or leave such rows out with --bad-rows skip"

    def _alike(self, where: str) -> Iterator[tuple[str, str]]:
        spelt: dict[str, list[str]] = {}
        for name in self.counts:
            spelt.setdefault(" ".join(name.casefold().split()), []).append(name)
        several = [names for names in spelt.values() if len(names) > 1]
        for names in several[:MOST_KINDS]:
            spellings = [f"{shown(name)} ({self.counts[name]:,} rows, first {self._at(name, where)})" for name in names]
            yield f"labels that differ only by case or blanks: {short_list(spellings)}", "write each label in one way"
        if len(several) > MOST_KINDS:
            yield f"and {len(several) - MOST_KINDS:,} more labels spelt in several ways", "write each label in one way"

    def _at(self, name: str, where: str) -> str:
        return self.first[name].removeprefix(f"{where}, ")


def classes_of(rows: Iterable[Labelled], where: str, *, drop: bool = False, counts: Counts | None = None) -> Classes:
    """The classes of training rows: sorted as numbers where all are whole numbers, else by name.

    Raises one UserError with all that stands in the way: a single class, classes of a single row, labels that differ
    only by case or blanks; `where` is what the data is called. With `drop` there are no classes of a single row: their
    rows, to be left out by the caller too (`drop_singles`), are counted in `counts` as rejected.
    """
    census = Census()
    for row in drop_singles(rows, counts) if drop else rows:
        census.add(row)
    return census.classes(where)


def drop_singles(rows: Iterable[Labelled], counts: Counts | None = None) -> list[Labelled]:
    """The rows without those that have a label which no other has; what is left out is counted as rejected."""
    kept, tally = list(rows), counts if counts is not None else Counts()
    many = Counter(label for row in kept for label in row.labels)
    while alone := [row for row in kept if any(many[label] == 1 for label in row.labels)]:
        kept = [row for row in kept if all(many[label] > 1 for label in row.labels)]
        for row in alone:
            tally.used -= 1
            tally.note(tally.rejected, ALONE, place_of(row.file, row.number))
            many.subtract(row.labels)  # where rows have several, this may leave others alone
    return kept


def check_known(
    rows: Iterable[Labelled], classes: Classes, where: str, whose: str = "the training data", fix: str = LEAVE_OUT
) -> None:
    """Raise one UserError for the labels that `classes`, `whose` they are, lack, and for lists where it has none."""
    wrong, known = Wrong(), set(classes.names)
    unknown: dict[str, str] = {}
    for row in rows:
        strange = [label for label in row.labels if label not in known]
        unlike = row.multi and not classes.multi
        if not strange and not unlike:
            continue
        spot = place_of(row.file, row.number).removeprefix(f"{where}, ")
        if unlike:
            wrong.add(f"a list of labels, where {whose} has one label a row", spot)
        for label in strange:
            if label not in unknown:
                unknown[label] = f"{shown(label)}{did_you_mean(label, classes.names)}"
            wrong.add(unknown[label], spot)
    refuse(wrong, f"{sum(wrong.many.values()):,} rows have labels that {whose} does not have", where, [fix])


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in their order: as numbers where all are whole numbers, else by name."""
    found = list(names)
    if all(WHOLE.fullmatch(name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def shown(label: str) -> str:
    """A label as messages quote it: a column of long texts may have been taken for one of labels."""
    return repr(label if len(label) <= 40 else label[:39] + "…")
