"""What the doctor for pairs reports: plain values, and lines for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from embedtune.data.check import Remark, rejected_lines, verdict_lines
from embedtune.data.doctors import Scores, Side

Kind = Literal["pairs", "scored pairs"]


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
        lines += rejected_lines(self.rejected, self.examples)
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
            lines += self.scores.lines()
        if self.unknown_share is not None:
            lines.append(f"unknown     {self.unknown_share:.2%} of the tokens")
        lines.append(
            f"duplicates  {self.exact_duplicates:,} pairs exactly, {self.near_duplicates:,} nearly on both sides; "
            f"{self.identical_sides:,} pairs with the same text on both sides"
        )
        if self.near_duplicates_rows < self.pairs:
            lines[-1] += f" (near ones looked for in the first {self.near_duplicates_rows:,} only)"
        return lines + verdict_lines(self.notes, self.verdict, self.remarks)
