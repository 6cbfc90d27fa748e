"""What the doctors for pairs and for labels share: a column of texts, scores on their scale, where rows stand."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from embedtune.data.check import BATCH_CHARACTERS, BATCH_ROWS, MANY_UNKNOWN, Lengths, Measure, Remark, Tally, lengths_of
from embedtune.data.clean import text_hash
from embedtune.data.read import EXAMPLES, place_of

NEAR = 0.8  # overlap of shingles from which texts nearly repeat each other
SCALES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))
BINS = 10
ASKS = {
    *("what", "who", "whom", "whose", "when", "where", "why", "which", "how", "is", "are", "was", "were", "do", "does"),
    *("did", "can", "could", "should", "would", "will", "may"),
}


@dataclass(frozen=True)
class Side:
    """The texts of one column, or of all columns of negatives."""

    name: str
    texts: int
    distinct: int
    lengths: Lengths | None
    cut: float  # share of all tokens that lie beyond the limit
    questions: float  # share of the texts that look like questions


@dataclass
class SideTally:
    """What one column gathers: 8 bytes for each text, and the lengths."""

    name: str
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    tally: Tally = field(default_factory=Tally)
    questions: int = 0
    batch: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, text: str, measure: Measure) -> None:
        """Take one text."""
        self.hashes.append(text_hash(text))
        self.questions += _asks(text)
        self.batch.append(text)
        self.size += len(text)
        if len(self.batch) == BATCH_ROWS or self.size > BATCH_CHARACTERS:
            self.flush(measure)

    def flush(self, measure: Measure) -> None:
        """Measure the texts that wait for it."""
        measure.add(self.batch, self.tally)
        self.batch, self.size = [], 0

    def done(self, measure: Measure, limit: int | None) -> Side:
        """The column after its last text."""
        self.flush(measure)
        many = self.tally.lengths.items()
        lengths = lengths_of(self.tally.lengths, measure.unit, measure.special, limit)
        tokens = sum(length * rows for length, rows in many)
        beyond = sum((length - limit) * rows for length, rows in many if length > limit) if limit else 0
        distinct, texts = len(np.unique(np.array(self.hashes, np.uint64))), len(self.hashes)
        return Side(self.name, texts, distinct, lengths, beyond / max(tokens, 1), self.questions / max(texts, 1))


def _asks(text: str) -> bool:
    """Whether a text looks like a question."""
    end, start = text[-20:].rstrip(" \t\"')»”"), text[:30].casefold().split()
    return end.endswith(("?", "\uff1f", "\u061f", "\u037e")) or (bool(start) and start[0].strip("¿\"'") in ASKS)


def unknown_share(sides: Sequence[SideTally], measure: Measure) -> float | None:
    """The share of tokens that are unknown to the tokenizer, special ones not counted; None without a tokenizer."""
    if measure.backend is None:
        return None
    texts = sum(len(side.hashes) for side in sides)
    tokens = sum(length * rows for side in sides for length, rows in side.tally.lengths.items())
    return sum(side.tally.unknown for side in sides) / max(tokens - measure.special * texts, 1)


def unknown_remarks(share: float | None) -> list[Remark]:
    """A remark where many tokens are unknown."""
    if share is None or share <= MANY_UNKNOWN:
        return []
    what = f"{share:.1%} of the tokens are unknown to the model's vocabulary"
    return [Remark(what, "choose a model for this language with --model")]


@dataclass
class Places:
    """Where rows stand, 12 bytes each."""

    names: list[str] = field(default_factory=list)
    files: array[int] = field(default_factory=lambda: array("I"))
    numbers: array[int] = field(default_factory=lambda: array("q"))

    def add(self, file: str, number: int) -> None:
        """Take the place of one row."""
        if not self.names or self.names[-1] != file:
            self.names.append(file)
        self.files.append(len(self.names) - 1)
        self.numbers.append(number)

    def at(self, row: int) -> tuple[str, int]:
        """File and number of a row."""
        return self.names[self.files[row]], self.numbers[row]


@dataclass(frozen=True)
class Scores:
    """The scores: those there, those beyond the scale that most of them are on, and a histogram of ten bins."""

    scored: int
    low: float
    high: float
    mean: float
    scale: tuple[float, float] | None
    beyond: int
    beyond_examples: list[str]
    histogram: list[int]
    edges: list[float]

    def lines(self) -> list[str]:
        """The report for a terminal."""
        scale = "no known scale" if self.scale is None else f"a scale of {self.scale[0]:g} to {self.scale[1]:g}"
        most = max(self.histogram)
        lines = [f"scores      {self.scored:,}, {self.low:g} to {self.high:g}, mean {self.mean:.3g}; {scale}"]
        for count, low, high in zip(self.histogram, self.edges, self.edges[1:]):
            lines.append(f"            {low:6.2f} to {high:6.2f} {count:>9,} {'#' * round(30 * count / most)}")
        return lines

    def outside(self) -> list[Remark]:
        """A remark where some lie beyond the scale."""
        if self.scale is None or not self.beyond:
            return []
        low, high = self.scale
        what = f"{self.beyond:,} score(s) lie outside of {low:g} to {high:g}: {'; '.join(self.beyond_examples)}"
        return [Remark(what, "mend these rows, or leave them out")]


def scores_of(values: np.ndarray, places: Places) -> Scores:
    """Scores (n,), one at least, and where they stand."""
    scale = scale_of(values)
    low, high = scale or (values.min(), values.max())
    beyond = np.flatnonzero((values < low) | (values > high))
    examples = [f"{place_of(*places.at(row))}: {values[row]:g}" for row in beyond[:EXAMPLES].tolist()]
    within = np.clip(values, low, high)
    histogram, edges = np.histogram(within, BINS, (low, high) if low < high else (low - 0.5, high + 0.5))
    return Scores(
        len(values), float(values.min()), float(values.max()), float(values.mean()), scale,
        len(beyond), examples, histogram.tolist(), edges.tolist(),
    )  # fmt: skip


def scale_of(values: np.ndarray) -> tuple[float, float] | None:
    """The first known scale that holds all scores but one in a hundred (all, where they are fewer than 20).

    Scores from -1 to 1 are cosines even where few are negative.
    """
    most = max(1, len(values) // 100) if len(values) >= 20 else 0
    for low, high in SCALES:
        beyond = values[(values < low) | (values > high)]
        if len(beyond) <= most and not (low == 0 and len(beyond) and (beyond >= -1).all() and (beyond < 0).all()):
            return low, high
    return None
