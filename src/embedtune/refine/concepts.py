"""Concepts: from a column of a user's table, or the token count, to numbers Z (n, k) in a form that is fixed and saved.

What is erased is what is linear in Z. So the kind says what is meant: a scalar erases the value itself, a function all
smooth functions of it, a category every class against the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
from scipy.interpolate import BSpline

from embedtune.errors import UserError, short_list

Kind = Literal["scalar", "ordinal", "category", "multilabel", "function"]
Source = Literal["column", "tokens", "log tokens"]
KINDS = get_args(Kind)
LENGTH = "length"  # the concept that is no column
NUMBERS = ("scalar", "ordinal", "function")
DEGREE, KNOTS = 3, 8  # a cubic spline on the ends and six quantiles between: ten basis functions
MOST_CLASSES = 10_000  # a column with more distinct values is no column of classes
SAMPLE = 100_000  # numbers kept for the quantiles


@dataclass(frozen=True)
class Encoding:
    """How values become rows of Z: a callable that can be saved as JSON and used on fresh data."""

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()  # category: the most frequent first, which gets no column of its own; multilabel
    knots: tuple[float, ...] = ()  # function: knots of the spline; ordinal: the levels in order
    source: Source = "column"

    @property
    def width(self) -> int:
        """k, the number of columns."""
        widths = {"category": len(self.classes) - 1, "multilabel": len(self.classes)}
        return widths.get(self.kind, len(self.knots) + DEGREE - 2 if self.kind == "function" else 1)

    def __call__(self, values: Iterable[Any]) -> np.ndarray:
        """Z (n, k) float64 of n values; the rows of missing ones are NaN.

        Raises UserError for a value that is not of this kind, or a class that was not there when it was fitted.
        """
        listed = list(values)
        if self.kind in NUMBERS:
            return self._of_numbers(np.array([_number(value, self.name, i) for i, value in enumerate(listed)], float))
        place = {label: i for i, label in enumerate(self.classes)}
        z = np.zeros((len(listed), len(self.classes)))
        for row, value in enumerate(listed):
            labels = _labels(value)
            if unknown := [label for label in labels or () if label not in place]:
                raise UserError(
                    f"{short_list([repr(label) for label in unknown])} is no class of the concept {self.name!r}, which "
                    f"was fitted on {short_list(self.classes, most=5)}",
                    fix="leave such rows out, or fit the concept on data that has them",
                )
            z[row, [place[label] for label in labels or ()]] = 1.0
            if labels is None:
                z[row] = np.nan
        return z if self.kind == "multilabel" else z[:, 1:]

    def _of_numbers(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "scalar":
            return values[:, None]
        knots = np.array(self.knots)
        if self.kind == "ordinal":
            return np.interp(values, knots, np.arange(len(knots)))[:, None] + 0 * values[:, None]
        known = np.isfinite(values)
        z = np.full((len(values), self.width), np.nan)
        ends = np.r_[[knots[0]] * DEGREE, knots, [knots[-1]] * DEGREE]
        inside = np.clip(values[known], knots[0], knots[-1])
        # The functions of the basis add up to one: the first is what the others leave.
        z[known] = BSpline.design_matrix(inside, ends, DEGREE).toarray()[:, 1:]
        return z

    def as_json(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Encoding:
        """What `as_json` gave."""
        values = {**fields, "classes": tuple(fields["classes"]), "knots": tuple(fields["knots"])}
        if values["kind"] not in KINDS or values["source"] not in get_args(Source):
            raise ValueError(f"no such kind of concept: {values['kind']!r} of {values['source']!r}")
        return cls(**values)


class Survey:
    """What the values of a concept look like, taken one by one; memory is flat in their number."""

    def __init__(self, name: str, source: Source = "column") -> None:
        self.name, self.source = name, source
        self.rows = self.missing = self.lists = self.words = self.whole = self.fractions = 0
        self.counts: dict[str, int] = {}
        self.sample: list[float] = []  # every `stride`-th number
        self.stride = 1
        self.low, self.high = np.inf, -np.inf

    def add(self, value: Any) -> bool:
        """Take one value; False where it is missing (None, NaN, blank), so that its row is to be left out."""
        self.rows += 1
        labels = _labels(value)
        if labels is None:
            self.missing += 1
            return False
        if isinstance(value, list | tuple):
            self.lists += 1
        elif _is_number(value):
            number = _number(value, self.name, self.rows - 1)
            self.fractions += not number.is_integer()
            self.whole += number.is_integer()
            self._sample(number)
        else:
            self.words += 1
        for label in labels:
            if label in self.counts or len(self.counts) <= MOST_CLASSES:
                self.counts[label] = self.counts.get(label, 0) + 1
        return True

    def encoding(self, kind: Kind | None = None) -> Encoding:
        """The encoding of these values; `kind` is found out where there is one choice only.

        Raises UserError for numbers without a kind that are all whole, values not of the kind, one class or value only.
        """
        chosen = self._kind(kind)
        if self.rows == self.missing:
            raise self._error("has no value in any row", "name a column that is filled")
        if chosen in NUMBERS:
            return self._numbers(chosen)
        if len(self.counts) > MOST_CLASSES:
            what = f"has more than {MOST_CLASSES:,} different values: these are no classes"
            raise self._error(what, "--kind scalar or --kind function, where they are numbers")
        if len(self.counts) < 2 and chosen == "category":
            raise self._error(f"has one class only, {next(iter(self.counts))!r}: there is nothing to erase")
        if not self.counts:
            raise self._error("has no label in any row: there is nothing to erase")
        return Encoding(self.name, chosen, tuple(sorted(self.counts, key=lambda c: (-self.counts[c], c))))

    def _kind(self, kind: Kind | None) -> Kind:
        if kind is not None and kind not in KINDS:
            raise UserError(f"must be one of {', '.join(KINDS)}, not {kind!r}", where="--kind")
        if self.lists and (kind not in (None, "multilabel") or self.lists + self.missing < self.rows):
            raise self._error(f"has lists in {self.lists:,} of {self.rows:,} rows", "--kind multilabel, lists in all")
        if kind in NUMBERS and self.words:
            what = f"is to be of kind {kind}, but {self.words:,} of {self.rows:,} values are no numbers"
            raise self._error(what, "--kind category")
        if kind is not None:
            return kind
        if self.lists or self.words:
            return "multilabel" if self.lists else "category"
        if self.fractions:
            return "scalar"
        raise self._error(
            "holds whole numbers, which may be classes or amounts: say which",
            "--kind category (classes), scalar (amounts), ordinal (ranks) or function (any smooth function of amounts)",
        )

    def _numbers(self, kind: Kind) -> Encoding:
        if self.low == self.high:
            raise self._error(f"is {self.low:g} in every row: there is nothing to erase")
        if kind == "scalar":
            return Encoding(self.name, kind, source=self.source)
        knots = _knots(self.low, self.high, self.sample)
        if kind == "ordinal":
            if len(self.counts) > MOST_CLASSES:
                raise self._error(f"has more than {MOST_CLASSES:,} levels", "--kind scalar or --kind function")
            knots = np.unique([float(level) for level in self.counts])
        return Encoding(self.name, kind, knots=tuple(knots.tolist()), source=self.source)

    def _sample(self, number: float) -> None:
        self.low, self.high = min(self.low, number), max(self.high, number)
        if (self.whole + self.fractions - 1) % self.stride == 0:
            self.sample.append(number)
        if len(self.sample) > SAMPLE:
            self.sample, self.stride = self.sample[::2], 2 * self.stride

    def _error(self, what: str, fix: str = "name another column") -> UserError:
        return UserError(what, where=f"concept {self.name!r}", fix=fix)


def length_encodings(tokens: np.ndarray, kind: Kind | None = None) -> tuple[Encoding, Encoding]:
    """The token count itself, and all smooth functions of its logarithm; tokens (n,) may be a memory map.

    Of kind "scalar" the second is the logarithm alone.

    Raises UserError where all texts are of one length.
    """
    low, high = np.log(np.maximum([tokens.min(), tokens.max()], 1))
    if low == high:
        what = f"is {tokens.max():,} tokens in every row: there is nothing to erase"
        raise UserError(what, where="concept 'length'", fix="give texts of different lengths")
    count = Encoding(LENGTH, "scalar", source="tokens")
    if kind == "scalar":
        return count, Encoding(LENGTH, "scalar", source="log tokens")
    stride = 1
    while len(tokens) > stride * SAMPLE:
        stride *= 2
    knots = _knots(low, high, np.log(np.maximum(tokens[::stride], 1)))
    return count, Encoding(LENGTH, "function", knots=tuple(knots.tolist()), source="log tokens")


def _knots(low: float, high: float, sample: np.ndarray | list[float]) -> np.ndarray:
    """Knots of a spline: the ends, and quantiles between."""
    return np.unique([low, *np.quantile(sample, np.linspace(0, 1, KNOTS)[1:-1]), high])


def encode(encodings: Sequence[Encoding], columns: Mapping[str, Sequence[Any]], tokens: np.ndarray) -> np.ndarray:
    """Z (n, k) of several concepts beside each other; `columns` holds n values by name, tokens (n,) the counts."""
    return np.hstack([np.zeros((len(tokens), 0)), *_parts(encodings, columns, tokens)])


def _parts(
    encodings: Sequence[Encoding], columns: Mapping[str, Sequence[Any]], tokens: np.ndarray
) -> Iterator[np.ndarray]:
    for encoding in encodings:
        if encoding.source == "column":
            yield encoding(columns[encoding.name])
        else:
            yield encoding(tokens if encoding.source == "tokens" else np.log(np.maximum(tokens, 1)))


def missing(value: Any) -> bool:
    """Whether a value is none: None, NaN or blank."""
    return _labels(value) is None


def _labels(value: Any) -> tuple[str, ...] | None:
    """A value as labels: 1 and 1.0 are "1", booleans "true" and "false"; None where nothing is there."""
    if isinstance(value, list | tuple):
        parts = [_labels(each) for each in value]
        return tuple(label for part in parts for label in part or ())
    if isinstance(value, bool | np.bool_):
        return (str(bool(value)).lower(),)
    if value is None or (isinstance(value, Real) and value != value) or (isinstance(value, str) and not value.strip()):
        return None  # tables write NaN where nothing is
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        return (str(int(number)) if number.is_integer() else repr(number),)
    return (str(value),)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a string that spells one (cells of .csv have no type)."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return value.strip().lstrip("+-").lower() not in ("nan", "inf", "infinity")
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _number(value: Any, name: str, row: int) -> float:
    if _labels(value) is None:
        return float("nan")
    try:
        number = float(value) if _is_number(value) else np.inf
    except OverflowError:  # a whole number beyond all floats
        number = np.inf
    if not np.isfinite(number):
        what = f"{repr(value)[:40]} is no finite number"
        raise UserError(what, where=f"concept {name!r}, value {row:,}", fix="mend the row")
    return number
