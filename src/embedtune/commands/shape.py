"""What a command is, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from embedtune.errors import UserError


class Talk(Protocol):
    """Where a command reports its progress."""

    def note(self, text: str) -> None:
        """One line."""

    def listener(self) -> Any:
        """What the training loop speaks to."""


@dataclass(frozen=True)
class Output:
    """The result: lines for a person (printed as they come), `data` for --json, and the exit code."""

    lines: Iterable[str]
    data: Any = field(default=None, repr=False)
    code: int = 0


Flags = tuple[list[str], Any]  # words that are left to parse, and the defaults (an instance of the command's kind)


@dataclass(frozen=True)
class Command:
    """A command: its flags are the fields of `kind`, and words before the first flag are the value of `first`."""

    usage: str
    summary: str
    kind: type
    run: Callable[[Any, Talk], Output]
    first: str | None = None
    defaults: Callable[[list[str]], Flags] | None = None


def models_first(argv: list[str]) -> Flags:
    """The words before the first flag are the models."""
    return (["--models", *argv] if argv and not argv[0].startswith("-") else argv), None


def refuse_existing(out: str, force: bool) -> None:
    """A UserError, before any work, where a result would replace a file that was not given up."""
    if Path(out).exists() and not force:
        raise UserError("exists already", where=out, fix="another --out, or --force")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([line[0].ljust(len(first)), *others]).rstrip()

    return [joined(line) for line in [header, *rows]]
