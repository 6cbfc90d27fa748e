"""What a judge found: one summary value for each measure, and the per-item values that a paired comparison needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import numpy as np

from embedtune.errors import UserError, did_you_mean

Task = Literal["retrieval", "similarity", "classification", "regression", "tagging"]


Best = Sequence[tuple[str, float]]  # documents (id, score), best first


class Ids(Protocol):
    """Ids by row: a list, or what reads them when they are asked for."""

    def __getitem__(self, row: int, /) -> str: ...


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best documents of each query, kept as `rows` (Q, k) of all `ids` with `scores` (Q, k), read as (id, score).

    As tuples they would take ten times the room, and what is shown of a million queries is a handful.
    """

    ids: Ids
    rows: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Best: ...
    @overload
    def __getitem__(self, at: slice) -> Ranked: ...
    def __getitem__(self, at: int | slice) -> Best | Ranked:
        if isinstance(at, slice):
            return Ranked(self.ids, self.rows[at], self.scores[at])
        return [(self.ids[row], score) for row, score in zip(self.rows[at].tolist(), self.scores[at].tolist())]

    def __iter__(self) -> Iterator[Best]:
        return (self[at] for at in range(len(self)))

    def as_json(self) -> list[_Line]:
        """The queries in their order, none of them read yet."""
        return [_Line(self, at) for at in range(len(self))]


@dataclass(frozen=True, slots=True)
class _Line:
    """What was found for one query."""

    ranked: Ranked
    at: int

    def as_json(self) -> list[list[Any]]:
        return [[key, float(score)] for key, score in self.ranked[self.at]]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """An array that JSON is to have as a list."""

    values: np.ndarray

    def as_json(self) -> list[Any]:
        if not np.isfinite(self.values).all():
            raise ValueError("a value of an item is not finite")
        found: list[Any] = np.asarray(self.values).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Report:
    """One model on one data set at one dimension.

    A measure in `values` has a number for each item, and its summary is their mean. Correlations, F1 and their like
    are no means of anything: for them the items keep `gold` and `predicted`, and `compare` computes the measure anew on
    every resample of the items. `found` holds the best documents (id, score) of each query.

    `gold` and `predicted` are scores (n,) each; of classification class numbers (n,), or 0/1 (n, C) where several
    classes apply, and probabilities (n, C) of `classes`; of tagging the entities (n,) of each sentence, and (n, 2)
    those predicted and those of them that are right. `counts` (n, 2 + 3T) of tagging: tokens, tokens that are right,
    and for each type in `classes` its entities, those predicted, those right. `dim` is 0 where no vectors are judged.
    """

    task: Task
    data: str
    model: str
    dim: int
    items: tuple[str, ...]
    summary: Mapping[str, float]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    gold: np.ndarray | None = None
    predicted: np.ndarray | None = None
    found: Ranked | Sequence[Best] = ()
    remarks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    counts: np.ndarray | None = None

    def measure(self, name: object) -> str:
        """The name under which a measure stands here, whatever its case. Raises UserError where it does not."""
        known = {key.lower(): key for key in self.summary}
        if (wanted := str(name)).lower() not in known:
            near = did_you_mean(wanted, list(self.summary))
            what = f"{wanted!r} was not measured{near}; there are {', '.join(self.summary)}"
            raise UserError(what, where=f"{self.model} on {self.data}")
        return known[wanted.lower()]

    def judged(self) -> tuple[np.ndarray, np.ndarray]:
        """`gold` and `predicted`. Raises UserError where the report keeps none."""
        if self.gold is None or self.predicted is None:
            raise UserError("the report keeps no predictions", where=f"{self.model} on {self.data}", fix="judge again")
        return self.gold, self.predicted

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; a summary that is not finite becomes None."""
        found: dict[str, Any] = _plain(self)
        return found

    def as_json(self) -> dict[str, Any]:
        """`as_dict` of which arrays become lists only when they are asked for (`files.json_pieces`)."""
        return {
            "task": self.task,
            "data": self.data,
            "model": self.model,
            "dim": self.dim,
            "summary": {key: float(value) if math.isfinite(value) else None for key, value in self.summary.items()},
            "items": list(self.items),
            "values": {key: _Numbers(value) for key, value in self.values.items()},
            "gold": None if self.gold is None else _Numbers(self.gold),
            "predicted": None if self.predicted is None else _Numbers(self.predicted),
            "found": self.found
            if isinstance(self.found, Ranked)
            else [[[key, float(score)] for key, score in best] for best in self.found],
            "remarks": list(self.remarks),
            "classes": list(self.classes),
            "counts": None if self.counts is None else _Numbers(self.counts),
        }


def _plain(value: Any) -> Any:
    """Lists, dicts and plain values, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, _Numbers):
        return value.as_json()
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return _plain(value.as_json()) if hasattr(value, "as_json") else value


def from_dict(saved: Mapping[str, Any]) -> Report:
    """The Report that `as_dict` gave, now or before there were classes. Raises UserError where something is missing."""
    try:
        gold, predicted, counts = saved["gold"], saved["predicted"], saved.get("counts")
        return Report(
            task=saved["task"],
            data=saved["data"],
            model=saved["model"],
            dim=saved["dim"],
            items=tuple(saved["items"]),
            summary={key: math.nan if value is None else value for key, value in saved["summary"].items()},
            values={key: np.array(value, np.float64) for key, value in saved["values"].items()},
            gold=None if gold is None else np.array(gold),
            predicted=None if predicted is None else np.array(predicted),
            found=tuple(tuple((key, score) for key, score in best) for best in saved["found"]),
            remarks=tuple(saved["remarks"]),
            classes=tuple(saved.get("classes", ())),
            counts=None if counts is None else np.array(counts),
        )
    except KeyError as error:
        raise UserError(f"has no {error.args[0]!r}: it is no saved report", fix="judge the model again") from error


def check_items(items: Sequence[str], gold: Sequence[Any] | np.ndarray, predicted: Any, data: str) -> None:
    """Raise UserError where there is nothing to judge, ValueError where there is not one of each for each item."""
    if not len(items) == len(gold) == len(predicted):
        raise ValueError(f"{len(items)} items, {len(gold)} gold, {len(predicted)} predicted of {data}")
    if len(items) == 0:
        raise UserError("has nothing to judge on", where=data)


def table(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the terminal: a row for each report, a column for each measure; '-' where it has none.

    There is a column for the dimension where vectors were judged, and one for the data where there are several.
    """
    measures = list(dict.fromkeys(key for report in reports for key in report.summary))
    several = len({report.data for report in reports}) > 1
    vectors = any(report.dim for report in reports)
    header = ["model", *(["data"] if several else []), *(["dim"] if vectors else []), "items", *measures]
    rows = [
        [
            report.model,
            *([report.data] if several else []),
            *([f"{report.dim:,}" if report.dim else "-"] if vectors else []),
            f"{len(report.items):,}",
            *(_shown(report.summary.get(key)) for key in measures),
        ]
        for report in reports
    ]
    return header, rows


def _shown(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
