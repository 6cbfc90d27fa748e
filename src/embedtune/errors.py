"""The one error type for a user's mistake, and the exit codes."""

from __future__ import annotations

from collections.abc import Sequence

MOST_DETAILS, MOST_LETTERS = 20, 500  # of a message: lines of details, and letters of each part
EXIT_FINE, EXIT_BUG, EXIT_USER, EXIT_REGRESSION = 0, 1, 2, 3


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and how to fix it.

    Printed as ``where: what``, then one indented line per detail, then ``fix: ...``; never with a traceback. `shared`:
    every process of a run has it already (fit/ranks.py).
    """

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", details: Sequence[str] = (), shared: bool = False
    ) -> None:
        self.what, self.where, self.fix, self.details, self.shared = what, where, fix, tuple(details), shared
        super().__init__(str(self))

    def __str__(self) -> str:
        # What is quoted may be as long as whoever wrote it wanted; the rest of a message must still be seen.
        lines = [f"{_clipped(self.where)}: {_clipped(self.what)}" if self.where else _clipped(self.what)]
        lines += [f"  {_clipped(detail)}" for detail in self.details[:MOST_DETAILS]]
        if len(self.details) > MOST_DETAILS:
            lines.append(f"  and {len(self.details) - MOST_DETAILS:,} more")
        if self.fix:
            lines.append(f"  fix: {_clipped(self.fix)}")
        return "\n".join(lines)


def _clipped(words: str) -> str:
    return words if len(words) <= MOST_LETTERS else f"{words[: MOST_LETTERS - 43]}...{words[-40:]}"


class Interrupted(BaseException):
    """A signal stopped the run (inside the loop after a checkpoint was written); `code` is 130 or 143.

    No Exception, as KeyboardInterrupt is none: it may come at any instant, and is no error of what was going on.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Parted(Exception):
    """This process and the others of its run cannot go on as one: another has ended, or this one has to."""


def short_list(items: Sequence[object], most: int = 3) -> str:
    """The first `most` items, comma-separated, with "..." where more follow."""
    shown = ", ".join(f"{item:,}" if isinstance(item, int) else str(item) for item in items[:most])
    return shown + (", ..." if len(items) > most else "")


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' (did you mean X?)' for the nearest choice, or '' where none is near."""
    import difflib

    # A table may have 100,000 columns, and a name 100,000 letters: comparing takes time in both.
    near = difflib.get_close_matches(word[:100], choices[:1000], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
