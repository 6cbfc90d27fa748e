"""What the doctor for pairs reports: plain values, and lines for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from embedtune.data.check import Lengths, Remark

Kind = Literal["pairs", "scored pairs"]


@dataclass(frozen=True)
class Side:
    """The texts of one column, or of all columns of negatives."""

    name: str
    texts: int
    distinct: int
    lengths: Lengths | None
    cut: float  # share of all tokens that lie beyond the limit
    questions: float  # share of the texts that look like questions


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


@dataclass(frozen=True)
class PairDiagnosis:
    """What `check_pairs` found; `verdict` is "ready", "usable, with remarks" or "not usable"."""

    verdict: str
    kind: Kind
    remarks: list[Remark]
    formats: list[str]
    files: int
    bytes: int
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]
    pairs: int
    sides: list[Side]
    positives_per_anchor: dict[str, float]
    negatives_per_pair: float
    identical_sides: int
    exact_duplicates: int
    near_duplicates: int
    near_duplicates_rows: int
    batch: int
    meet: float
    couples: float
    scores: Scores | None
    unknown_share: float | None
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = [
            f"format      {', '.join(self.formats) or 'none'}, {self.kind}",
            f"size        {self.bytes:,} bytes in {self.files:,} file(s), sha256 {self.sha256[:16]}",
            f"rows        {self.rows:,} read, {self.used:,} used, {self.pairs:,} pairs",
        ]
        for reason, count in self.rejected.items():
            more = "; ..." if count > len(self.examples[reason]) else ""
            lines.append(f"            {count:,} {reason}: {'; '.join(self.examples[reason])}{more}")
        for side in self.sides:
            lines.append(
                f"{side.name:<11} {side.texts:,}, {side.distinct:,} distinct, {side.questions:.0%} look like questions"
            )
            if n := side.lengths:
                head = f"            {n.unit}:"
                lines.append(f"{head} mean {n.mean:,.1f}, median {n.median:,}, p95 {n.p95:,}, max {n.max:,}")
                if n.limit:
                    cut = f"{n.longer:,} texts are longer than {n.limit:,}, {side.cut:.1%} of all {n.unit} would be cut"
                    lines.append(f"            {cut}")
        if self.kind == "pairs" and self.pairs:
            most, mean = self.positives_per_anchor["max"], self.positives_per_anchor["mean"]
            lines.append(f"per anchor  {mean:.2f} positives, at most {most:,.0f}")
            if self.negatives_per_pair:
                lines.append(f"per pair    {self.negatives_per_pair:.2f} negatives")
            meet = f"{self.meet:.1%} of the pairs meet their own anchor or positive in another pair"
            lines.append(f"batches     of {self.batch} at random: {meet} ({self.couples:.2f} couples a batch)")
        if self.scores:
            lines += _score_lines(self.scores)
        if self.unknown_share is not None:
            lines.append(f"unknown     {self.unknown_share:.2%} of the tokens")
        lines.append(
            f"duplicates  {self.exact_duplicates:,} pairs exactly, {self.near_duplicates:,} nearly on both sides; "
            f"{self.identical_sides:,} pairs with the same text on both sides"
        )
        if self.near_duplicates_rows < self.pairs:
            lines[-1] += f" (near ones looked for in the first {self.near_duplicates_rows:,} only)"
        lines += [f"note        {note}" for note in self.notes]
        lines.append(f"verdict     {self.verdict}")
        for remark in self.remarks:
            lines += [f"  - {remark.what}"] + ([f"    fix: {remark.fix}"] if remark.fix else [])
        return lines


def _score_lines(scores: Scores) -> list[str]:
    scale = "no known scale" if scores.scale is None else f"a scale of {scores.scale[0]:g} to {scores.scale[1]:g}"
    most = max(scores.histogram)
    lines = [f"scores      {scores.scored:,}, {scores.low:g} to {scores.high:g}, mean {scores.mean:.3g}; {scale}"]
    for count, low, high in zip(scores.histogram, scores.edges, scores.edges[1:]):
        lines.append(f"            {low:6.2f} to {high:6.2f} {count:>9,} {'#' * round(30 * count / most)}")
    return lines
