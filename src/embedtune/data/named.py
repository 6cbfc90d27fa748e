"""Rows with their cells under our names, whatever the columns are called; what cannot be used is said once, counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from embedtune.data.formats import DELIMITED, check_parted
from embedtune.data.lines import SKIP, Problem, ending
from embedtune.data.read import BadRows, Counts, DataLike, Row, place
from embedtune.errors import UserError, did_you_mean, short_list

MOST_KINDS = 10  # of what is wrong that are listed
SHOWN = 3  # places of each

T = TypeVar("T")


def unusable(what: str, fix: str = SKIP) -> Problem:
    """A problem that is counted under the words that say what it is."""
    return Problem(what, what, fix=fix)


class Named(NamedTuple):
    """A row, its cells by our names, and what those columns are called in the data."""

    row: Row
    cells: dict[str, Any]
    names: dict[str, str]


@dataclass
class Wrong:
    """Rows that cannot be used, by what is wrong with them."""

    found: dict[str, list[str]] = field(default_factory=dict)
    many: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, place: str) -> None:
        """Count what is wrong at a place."""
        self.many[what] = self.many.get(what, 0) + 1
        if len(places := self.found.setdefault(what, [])) <= SHOWN:
            places.append(place)


def name_of(data: DataLike) -> str:
    """What messages call the data."""
    return str(data) if isinstance(data, (str, Path)) else "the list"


def has_header(columns: Mapping[str, str] | None) -> bool:
    """Whether the columns have names: the user gives no numbers for them."""
    return not columns or not all(name.isdecimal() for name in columns.values())


def find_column(synonyms: Sequence[str], there: Sequence[str]) -> str | None:
    """The column of `there` whose name comes first in `synonyms`, in whatever case."""
    known = {name.casefold(): name for name in reversed(there)}
    return next((known[name.casefold()] for name in synonyms if name.casefold() in known), None)


def renamed(columns: Mapping[str, str] | None, ours: Sequence[str]) -> dict[str, str]:
    """The user's own names for our columns; a UserError for a column that is not ours."""
    given = dict(columns or {})
    if unknown := [name for name in given if name not in ours]:
        raise UserError(
            f"{unknown[0]!r} is no column of ours{did_you_mean(unknown[0], list(ours))}; there are {', '.join(ours)}",
            where="--columns",
        )
    return {name: given.get(name, "") for name in ours}


def finite(value: Any) -> float | None:
    """A cell as a finite number, None where it is none."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # the last: an int beyond all floats
        number = math.nan
    return number if math.isfinite(number) else None


def named(
    rows: Iterable[Row],
    synonyms: Mapping[str, Sequence[str]],
    must: Sequence[str],
    columns: Mapping[str, str] | None,
    tally: Counts,
    otherwise: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Named]:
    """Each row with its cells by our names; a UserError where a column is missing that must be there.

    `synonyms` has the names that each of our columns goes by, `must` the columns that have to be there, `columns` the
    user's own names; `otherwise` has names for those of `must` where none of them is there. A column that goes by
    another name is noted in `tally`.
    """
    given = {our: name for our, name in renamed(columns, tuple(synonyms)).items() if name}
    file, there = None, []
    first: dict[str, str] = {}
    names: dict[str, str] = {}
    for row in rows:
        if row.file != file or list(row.values) != there:
            there = list(row.values)
            free = [name for name in there if name not in given.values()]
            found = {our: given.get(our) or find_column(synonyms[our], free) for our in synonyms}
            if otherwise and not any(found[our] for our in must):
                found |= {our: find_column(otherwise[our], free) for our in must}
            names = {our: name for our, name in found.items() if name}
            if row.file != file:
                file, first = row.file, names
                _check_columns(names, must, row, has_header(columns))
                others = {our: name for our, name in names.items() if name != our and our not in given}
                tally.notes += [f"{file}: took the column {name!r} as {our!r}" for our, name in others.items()]
            # A record of other keys: of JSON, or a dict. What it lacks is an empty cell.
            names = first | names
        yield Named(row, {our: row.values.get(name) for our, name in names.items()}, names)


def _check_columns(names: Mapping[str, str], must: Sequence[str], row: Row, header: bool) -> None:
    there = list(row.values)
    expected, listed = ", ".join(map(repr, must)), short_list([repr(name[:40]) for name in there], most=20)
    for our in dict.fromkeys([*must, *names]):
        asked = names.get(our, our)
        if asked in there:
            continue
        if not header and len(there) == 1 and ending(Path(row.file))[0] in DELIMITED:
            check_parted(row.values[there[0]], place(row))  # here, for one column alone may hold any text
        near = did_you_mean(asked, there) or did_you_mean(our, there)
        example = next((name for name in there if name not in names.values()), "NAME")
        raise UserError(
            f"expected columns {expected}, found {listed}{near}: no column {asked!r}",
            where=row.file,
            fix=f"--columns {our}=NAME, for example --columns {our}={example[:40]}",
        )


def usable(made: Iterable[tuple[Row, T | list[Problem]]], where: str, bad_rows: BadRows, tally: Counts) -> Iterator[T]:
    """What was made of the rows; problems are counted, and refused together after the last row where bad rows fail.

    A problem's `at` says where it is, if that is more than the row's place.
    """
    wrong, first, bad = Wrong(), tally.rows, 0
    fixes: dict[str, None] = {}
    for row, found in made:
        if not isinstance(found, list):
            yield found
            continue
        tally.used, bad = tally.used - 1, bad + 1
        tally.note(tally.rejected, found[0], found[0].at or place(row))
        for problem in found:
            wrong.add(problem.what, (problem.at or place(row)).removeprefix(f"{where}, "))
            fixes[problem.fix] = None
    if bad_rows == "fail":
        refuse(wrong, f"{bad:,} of {tally.rows - first:,} rows cannot be used", where, fixes)


def refuse(wrong: Wrong, what: str, where: str, fixes: Iterable[str]) -> None:
    """One UserError with all that is wrong, how often and where, if anything is."""
    if wrong.many:
        kinds = sorted(wrong.many.items(), key=lambda kind: -kind[1])
        details = [f"{kind} ({n:,}): {short_list(wrong.found[kind])}" for kind, n in kinds[:MOST_KINDS]]
        details += [f"and {len(kinds) - MOST_KINDS:,} more"] if len(kinds) > MOST_KINDS else []
        raise UserError(what, where=where, details=details, fix="; ".join(filter(None, fixes)))
