"""How a division is asked for, and what it is said to be: the plan and the report of `divide.split`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embedtune.data.sides import check_near
from embedtune.errors import UserError

PARTS: Mapping[str, float] = {"train": 0.8, "dev": 0.1, "test": 0.1}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How `split` divides."""

    # What stays together: rows that repeat each other (cluster), a document, or rows with one value in a COLUMN.
    by: str = "cluster"
    # The parts and their shares, which add up to 1.
    parts: Mapping[str, float] = field(default_factory=lambda: dict(PARTS))
    # Another seed gives another division.
    seed: int = 0
    # Overlap of 3-word shingles from which two texts are near; None: only exact repeats count.
    near: float | None = 0.8

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        check_near(self.near)
        fix = "--parts train=0.8,dev=0.1,test=0.1"
        if len(self.parts) < 2:
            raise UserError("must be two parts at least", where="--parts", fix=fix)
        for name, share in self.parts.items():
            if not re.fullmatch(r"\w[\w-]*", name) or name == "manifest":
                raise UserError(f"{name!r} cannot be the name of a file", where="--parts", fix=fix)
            if not 0 < share < 1:
                raise UserError(f"the share of {name} must be between 0 and 1, not {share:g}", where="--parts", fix=fix)
        if abs(sum(self.parts.values()) - 1) > 1e-6:
            total = sum(self.parts.values())
            raise UserError(f"the shares must add up to 1, not {total:g}", where="--parts", fix=fix)


@dataclass(frozen=True)
class Overlap:
    """Rows of the part `of` with a text that also stands in the part `into`: so many exactly, so many others nearly."""

    of: str
    into: str
    rows: int
    exact: int
    near: int
    examples: list[str]

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        """In words: how many, then a line for each example."""
        return [
            f"{self.of} in {self.into}: {self.exact:,} exact, {self.near:,} near of {self.rows:,} rows",
            *self.examples,
        ]


@dataclass(frozen=True)
class Divided:
    """What `split` did; `parts` has rows, groups and the file of each part."""

    folder: str
    by: str
    near: float | None
    seed: int
    rows: int
    used: int
    groups: int
    largest: int
    parts: dict[str, dict[str, Any]]
    overlaps: list[Overlap]
    dropped: dict[str, int]
    replaced: dict[str, int]
    examples: dict[str, list[str]]
    compared: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = [f"read        {self.rows:,} rows, {self.used:,} used; compared by {', '.join(self.compared)}"]
        for head, counted in (("dropped", self.dropped), ("mended", self.replaced)):
            for reason, count in counted.items():
                more = "; ..." if count > len(self.examples[reason]) else ""
                lines.append(f"{head:<11} {count:,} {reason}: {'; '.join(self.examples[reason])}{more}")
        lines.append(f"groups      {self.groups:,} by {self.by}, the largest of {self.largest:,} rows")
        for name, part in self.parts.items():
            share = part["rows"] / self.used
            lines.append(f"{name:<11} {part['rows']:,} rows ({share:.1%}), {part['groups']:,} groups: {part['file']}")
        lines += [f"overlap     {overlap}" for overlap in self.overlaps]
        return lines + [f"note        {note}" for note in self.notes]
