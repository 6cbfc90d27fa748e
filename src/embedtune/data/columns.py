"""Column names as the user gives them."""

from __future__ import annotations

from embedtune.errors import UserError


def parse_columns(columns: str | None) -> dict[str, str]:
    """'text=body,label=stars' as a mapping; a UserError where it is not of that form."""
    pairs = [part.split("=") for part in columns.split(",")] if columns else []
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"{columns!r} is not of the form text=NAME", where="--columns")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}
