"""What the doctor for labels reports: plain values, and lines for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from embedtune.data.check import Lengths, Remark, rejected_lines, verdict_lines
from embedtune.data.doctors import Scores

LabelKind = Literal["labelled", "graded", "tagged"]

MOST_CLASSES = 20  # listed one by one
LONGEST_NAME, LONGEST_BAR = 40, 30


@dataclass(frozen=True)
class ClassCount:
    """A class and its rows, or a type of entities and how many there are; `share` is of all rows or entities."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class LabelDiagnosis:
    """What `check_labels` found; `verdict` is "ready", "usable, with remarks" or "not usable"."""

    verdict: str
    kind: LabelKind
    remarks: list[Remark]
    formats: list[str]
    files: int
    bytes: int
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]
    paired: bool  # whether rows have a second text
    multi: bool  # whether rows have lists of labels
    classes: list[ClassCount]
    without: int  # rows without any label, or sentences without an entity
    scheme: str | None
    scores: Scores | None
    lengths: Lengths | None
    cut: float  # share of all tokens that lie beyond the limit
    unknown_share: float | None
    exact_duplicates: int
    near_duplicates: int
    near_duplicates_rows: int
    conflicts: int  # rows that repeat an earlier one, with another label
    conflict_examples: list[str]
    across: int  # rows that repeat one of another file
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        what = {"labelled": "labels", "graded": "scores", "tagged": f"tags ({self.scheme})"}[self.kind]
        texts = "pairs of texts" if self.paired else "texts"
        lines = [
            f"format      {', '.join(self.formats) or 'none'}, {texts} with {what}",
            f"size        {self.bytes:,} bytes in {self.files:,} file(s), sha256 {self.sha256[:16]}",
            f"rows        {self.rows:,} read, {self.used:,} used",
        ]
        lines += rejected_lines(self.rejected, self.examples)
        if self.kind != "graded":
            lines += self._class_lines()
        if self.scores:
            lines += self.scores.lines()
        if n := self.lengths:
            lines.append(f"{n.unit:<11} mean {n.mean:,.1f}, median {n.median:,}, p95 {n.p95:,}, max {n.max:,}")
            if n.limit:
                cut = f"{self.cut:.1%} of all {n.unit} would be cut"
                lines.append(f"            {n.longer:,} rows are longer than {n.limit:,}, {cut}")
        if self.unknown_share is not None:
            lines.append(f"unknown     {self.unknown_share:.2%} of the tokens")
        repeats = f"{self.exact_duplicates:,} exact, {self.near_duplicates:,} near"
        lines.append(f"duplicates  {repeats}; {self.conflicts:,} of them with another label")
        if self.near_duplicates_rows < self.used:
            lines[-1] += f" (near ones looked for in the first {self.near_duplicates_rows:,} rows only)"
        return lines + verdict_lines(self.notes, self.verdict, self.remarks)

    def _class_lines(self) -> list[str]:
        """The classes, or the commonest and the rarest of them where they are many."""
        noun, empty = ("types", "an entity") if self.kind == "tagged" else ("classes", "a label")
        several = ", any number a row" if self.multi else ""
        lines = [f"{noun:<11} {len(self.classes):,}{several}"]
        order = sorted(self.classes, key=lambda each: -each.count)
        half = MOST_CLASSES // 2
        shown = order if len(order) <= MOST_CLASSES else [*order[:half], *order[-half:]]
        width = max((len(_short(each.name)) for each in shown), default=0)
        most = max((each.share for each in shown), default=1)
        for number, each in enumerate(shown):
            if number == half and len(shown) < len(order):
                lines.append(f"            ... {len(order) - len(shown):,} more ...")
            bar = "#" * round(LONGEST_BAR * each.share / most)
            lines.append(f"            {_short(each.name):<{width}} {each.count:>9,} {each.share:>6.1%} {bar}".rstrip())
        if self.without:
            lines.append(f"            {self.without:,} rows without {empty}")
        return lines


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
