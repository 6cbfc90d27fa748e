"""The doctor for pairs and scored pairs: reads all of them, and lists what is wrong or would make training worse."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
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
from embedtune.data.doctors import NEAR, Places, Scores, Side, SideTally, scores_of, unknown_remarks, unknown_share
from embedtune.data.hub import HUB
from embedtune.data.lines import ending, find_files
from embedtune.data.near import leaders
from embedtune.data.pair_report import Kind, PairDiagnosis
from embedtune.data.pairs import SYNONYMS, Pair, ScoredPair, read_pairs, read_scored
from embedtune.data.read import Counts, DataLike, read_rows
from embedtune.data.retrieval import is_beir
from embedtune.data.shingles import sets_of
from embedtune.errors import UserError

FEWEST = 8  # pairs, below which training refuses
BATCH = 32
MANY_MEET = 0.1  # share of pairs with a false negative in their batch that earns a remark
LONGER = 2.0  # anchors so many times as long as positives look swapped


def kind_of(data: DataLike, columns: Mapping[str, str] | None = None) -> Kind | None:
    """What the columns make of the data, None for text without pairs; UserError where it cannot be read at all."""
    named = set(columns or ())
    if named & {"sentence1", "sentence2", "score"}:
        return "scored pairs"
    if named & {"anchor", "positive", "negative"} or (isinstance(data, (str, Path)) and is_beir(data)):
        return "pairs"
    names = {name.casefold() for name in next(iter(read_rows(data, bad_rows="skip"))).values}
    has = {our for our, synonyms in SYNONYMS.items() if any(word.casefold() in names for word in synonyms)}
    if {"sentence1", "sentence2"} <= has:
        return "scored pairs"
    return "pairs" if {"anchor", "positive"} <= has else None


@dataclass
class _Pairs:
    """What one pass over the pairs gathers."""

    sides: list[SideTally]
    pairs: int = 0
    identical: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    scores: array[float] = field(default_factory=lambda: array("d"))
    places: Places = field(default_factory=Places)  # of the scores

    def add(self, pair: Pair | ScoredPair, measure: Measure) -> None:
        """Take one pair."""
        a, b = (pair.anchor, pair.positive) if isinstance(pair, Pair) else (pair.sentence1, pair.sentence2)
        self.sides[0].add(a, measure)
        self.sides[1].add(b, measure)
        self.pairs += 1
        self.identical += self.sides[0].hashes[-1] == self.sides[1].hashes[-1]
        if len(self.first) < NEAR_ROWS:
            self.first.append((a[:NEAR_CHARACTERS], b[:NEAR_CHARACTERS]))
        if isinstance(pair, Pair):
            for negative in pair.negatives:
                self.sides[2].add(negative, measure)
        elif pair.score is not None:
            self.scores.append(pair.score)
            self.places.add(pair.file, pair.number)


def check_pairs(
    data: DataLike,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> PairDiagnosis:
    """Examine pairs, or scored pairs, without stopping at bad rows; `tokenizer` is a Hugging Face fast tokenizer.

    max_length: in tokens, special ones included (words without a tokenizer). Raises UserError only where there is
    nothing to examine: no such file, no known ending, no fast tokenizer. In memory stand about 40 bytes a pair.
    """
    measure, counts, fatal = Measure(tokenizer), Counts(), []
    sources: list[Any] = [data]
    if isinstance(data, (str, Path)) and not str(data).startswith(HUB) and not is_beir(data):
        sources, counts.ignored = find_files(data)
    kind: Kind = "pairs"
    with suppress(UserError):  # reading will say it again
        kind = kind_of(data, columns) or "pairs"
    names = ["anchors", "positives", "negatives"] if kind == "pairs" else ["sentence1", "sentence2"]
    found = _Pairs([SideTally(name) for name in names])
    for source in sources:
        try:
            for pair in _read(source, kind, columns, counts):
                found.add(pair, measure)
        except UserError as error:
            fatal.append(error)
    return _diagnose(kind, found, counts, fatal, measure, max_length)


def _read(
    source: DataLike, kind: Kind, columns: Mapping[str, str] | None, counts: Counts
) -> Iterator[Pair] | Iterator[ScoredPair]:
    if kind == "scored pairs":
        return read_scored(source, columns=columns, bad_rows="skip", counts=counts)
    split = "train"
    if isinstance(source, (str, Path)) and is_beir(source):
        there = sorted(path.name.split(".")[0] for path in (Path(source) / "qrels").glob("*.tsv*"))
        split = split if split in there or not there else there[0]
        counts.notes.append(f"the pairs are the judgements of {split!r}, one of {', '.join(there) or 'none'}")
    return read_pairs(source, columns=columns, bad_rows="skip", counts=counts, split=split)


def _diagnose(
    kind: Kind, found: _Pairs, counts: Counts, fatal: list[UserError], measure: Measure, limit: int | None
) -> PairDiagnosis:
    sides = [side.done(measure, limit) for side in found.sides]
    repeats, unknown = _repeats(found), unknown_share(found.sides, measure)
    scores = scores_of(np.array(found.scores), found.places) if found.scores else None
    stops = [Remark(*error_parts(error)) for error in fatal]
    if found.pairs or not stops:
        stops += _stops(kind, found, sides, scores)
    remarks = list(stops)
    if found.pairs:
        remarks += row_remarks(counts) + _remarks(found, sides, repeats, unknown)
        if kind == "pairs":
            remarks += _pair_remarks(found, sides, repeats)
        elif scores is None:
            what = "no scores: training would draw pseudo-scores, which say only that all pairs are alike"
            remarks.append(Remark(what, "name the column, --columns score=NAME; or train on them as pairs"))
    return PairDiagnosis(
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
        pairs=found.pairs,
        sides=[side for side in sides if side.texts],
        positives_per_anchor={"mean": found.pairs / max(sides[0].distinct, 1), "max": repeats.most},
        negatives_per_pair=sum(side.texts for side in sides[2:]) / max(found.pairs, 1),
        identical_sides=found.identical,
        exact_duplicates=repeats.exact,
        near_duplicates=repeats.near,
        near_duplicates_rows=len(found.first),
        batch=repeats.batch,
        meet=repeats.meet,
        couples=repeats.couples,
        scores=scores,
        unknown_share=unknown,
        notes=counts.notes,
    )


class _Repeats(NamedTuple):
    """How often texts come again: pairs exactly and nearly, the most pairs of one anchor, and within a batch."""

    exact: int
    near: int
    most: int
    batch: int
    meet: float
    couples: float


def _repeats(found: _Pairs) -> _Repeats:
    codes = [np.unique(np.array(side.hashes, np.uint64), return_inverse=True)[1] for side in found.sides[:2]]
    distinct = len(np.unique(np.stack(codes), axis=1).T) if found.pairs else 0
    first = sets_of(found.first)
    near = int((leaders(first, NEAR) != np.arange(len(first))).sum()) - (len(first) - len(np.unique(first.exact)))
    most = int(np.bincount(codes[0]).max()) if found.pairs else 0
    return _Repeats(found.pairs - distinct, near, most, min(BATCH, found.pairs), *meetings(codes[0], codes[1], BATCH))


def meetings(anchors: np.ndarray, positives: np.ndarray, batch: int) -> tuple[float, float]:
    """How often pairs of a random batch (without replacement) share an anchor or a positive, by their (n,) codes.

    First the share of the pairs that meet such another in their batch: for a pair that s - 1 of the other n - 1 share
    with, none of the b - 1 drawn is one of these with probability C(n - s, b - 1) / C(n - 1, b - 1). Then the expected
    number of couples that share: C(b, 2) times the share of all couples.
    """
    n = len(anchors)
    b = min(batch, n)
    if b < 2:
        return 0.0, 0.0
    both = np.unique(anchors * (int(positives.max()) + 1) + positives, return_inverse=True)[1]
    a, p, ap = (np.bincount(codes)[codes] for codes in (anchors, positives, both))
    sharing = a + p - ap  # with itself
    drawn = np.arange(b - 1)[:, None]
    values, many = np.unique(sharing, return_counts=True)
    none = np.prod((n - values - drawn) / (n - 1 - drawn), axis=0)
    couples = float((sharing - 1).sum() / 2)
    return float((many * (1 - none)).sum() / n), couples / (n * (n - 1) / 2) * (b * (b - 1) / 2)


def _stops(kind: Kind, found: _Pairs, sides: list[Side], scores: Scores | None) -> list[Remark]:
    """What training would refuse."""
    stops = []
    if found.pairs < FEWEST:
        stops.append(Remark(f"only {found.pairs:,} pairs: too few to learn from", "give some hundreds of pairs"))
    if kind == "pairs" and sides[1].distinct == 1:
        fix = "check --columns: is the column of positives one of labels?"
        stops.append(Remark("one distinct positive for all anchors: there is nothing to tell apart", fix))
    if not scores:
        return stops
    if scores.scored < found.pairs:
        what = f"{found.pairs - scores.scored:,} of {found.pairs:,} pairs have no score, the others have one"
        stops.append(Remark(what, "give all of them a score, or none"))
    if scores.low == scores.high:
        what = f"all scores are {scores.low:g}: there is nothing to learn"
        stops.append(Remark(what, "check --columns score=NAME"))
    if scores.scale is None:
        what = f"scores run from {scores.low:g} to {scores.high:g}, on no scale that is known"
        stops.append(Remark(what, "mend them; or say the scale when training: --low and --high"))
    return stops + scores.outside()


def _remarks(found: _Pairs, sides: list[Side], repeats: _Repeats, unknown: float | None) -> list[Remark]:
    """What training would take, but should not have to."""
    remarks, cleaning = [], "embedtune data clean FILE --out NEW"
    if FEWEST <= found.pairs < FEW_ROWS:
        remarks.append(Remark(f"only {found.pairs:,} pairs: too few to learn much from", "give some hundreds of pairs"))
    if repeats.exact > MANY_DUPLICATES * found.pairs:
        what = f"{repeats.exact:,} pairs ({repeats.exact / found.pairs:.1%}) repeat an earlier one"
        remarks.append(Remark(what, cleaning))
    if repeats.near > MANY_NEAR * len(found.first):
        what = f"{repeats.near:,} of the first {len(found.first):,} pairs nearly repeat an earlier one on both sides"
        remarks.append(Remark(what, cleaning))
    remarks += unknown_remarks(unknown)
    for side in sides:
        if side.lengths and side.lengths.longer > MANY_LONG * side.texts:
            n = side.lengths
            what = f"{n.longer:,} {side.name} ({n.longer / side.texts:.0%}) are longer than {n.limit:,} {n.unit}"
            remarks.append(Remark(f"{what}: {side.cut:.0%} of their {n.unit} would be cut", "give shorter passages"))
    return remarks


def _pair_remarks(found: _Pairs, sides: list[Side], repeats: _Repeats) -> list[Remark]:
    """Pairs of one text, columns that look swapped, and texts that would be their own negatives."""
    remarks = []
    if found.identical:
        what = f"{found.identical:,} pair(s) have the same text on both sides: they teach nothing"
        remarks.append(Remark(what, "embedtune data clean FILE --drop-empty --out NEW"))
    left, right = sides[0], sides[1]
    asked = right.questions >= 0.5 and right.questions > left.questions
    if asked and left.lengths and right.lengths and left.lengths.mean >= LONGER * right.lengths.mean:
        means = f"{left.lengths.mean:,.0f} {left.lengths.unit} on average, positives {right.lengths.mean:,.0f}"
        what = f"the columns look swapped: anchors have {means}, {right.questions:.0%} of the positives are questions"
        fix = "--columns anchor=NAME,positive=NAME: anchors are the questions, positives what answers them"
        remarks.append(Remark(what, fix))
    if repeats.meet > MANY_MEET:
        what = f"{repeats.meet:.0%} of the pairs of a random batch of {repeats.batch} meet their own anchor or positive"
        fix = "nothing: training keeps such pairs apart, or masks them; with a loss of your own see that it does too"
        remarks.append(Remark(f"{what} in another pair, where it would be a negative", fix))
    return remarks
