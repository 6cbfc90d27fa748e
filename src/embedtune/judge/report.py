"""What a judge found: one summary value for each measure, and the per-item values that a paired comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from embedtune.errors import UserError, did_you_mean

Task = Literal["retrieval", "similarity"]


@dataclass(frozen=True, eq=False)
class Report:
    """One model on one data set at one dimension.

    A measure in `values` has a number for each item, and its summary is their mean. Spearman and Pearson are no
    means of anything: for them the items keep `gold` and `predicted` (n,), and `compare` computes the correlation
    anew on every resample of the items. `found` holds the best documents (id, score) of each query.
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
    found: Sequence[Sequence[tuple[str, float]]] = ()
    remarks: tuple[str, ...] = ()

    def measure(self, name: object) -> str:
        """The name under which a measure stands here, whatever its case. Raises UserError where it does not."""
        known = {key.lower(): key for key in self.summary}
        if (wanted := str(name)).lower() not in known:
            near = did_you_mean(wanted, list(self.summary))
            what = f"{wanted!r} was not measured{near}; there are {', '.join(self.summary)}"
            raise UserError(what, where=f"{self.model} on {self.data}")
        return known[wanted.lower()]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; a summary that is not finite becomes None."""
        return {
            "task": self.task,
            "data": self.data,
            "model": self.model,
            "dim": self.dim,
            "summary": {key: float(value) if math.isfinite(value) else None for key, value in self.summary.items()},
            "items": list(self.items),
            "values": {key: _numbers(value) for key, value in self.values.items()},
            "gold": None if self.gold is None else _numbers(self.gold),
            "predicted": None if self.predicted is None else _numbers(self.predicted),
            "found": [[[key, float(score)] for key, score in best] for best in self.found],
            "remarks": list(self.remarks),
        }


def from_dict(saved: Mapping[str, Any]) -> Report:
    """The Report that `as_dict` gave. Raises UserError where something is missing."""
    try:
        gold, predicted = saved["gold"], saved["predicted"]
        return Report(
            task=saved["task"],
            data=saved["data"],
            model=saved["model"],
            dim=saved["dim"],
            items=tuple(saved["items"]),
            summary={key: math.nan if value is None else value for key, value in saved["summary"].items()},
            values={key: np.array(value, np.float64) for key, value in saved["values"].items()},
            gold=None if gold is None else np.array(gold, np.float64),
            predicted=None if predicted is None else np.array(predicted, np.float64),
            found=tuple(tuple((key, score) for key, score in best) for best in saved["found"]),
            remarks=tuple(saved["remarks"]),
        )
    except KeyError as error:
        raise UserError(f"has no {error.args[0]!r}: it is no saved report", fix="judge the model again") from error


def table(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the terminal: a row for each report, a column for each measure; '-' where it has none."""
    measures = list(dict.fromkeys(key for report in reports for key in report.summary))
    several = len({report.data for report in reports}) > 1
    header = ["model", *(["data"] if several else []), "dim", "items", *measures]
    rows = [
        [
            report.model,
            *([report.data] if several else []),
            f"{report.dim:,}",
            f"{len(report.items):,}",
            *(_shown(report.summary.get(key)) for key in measures),
        ]
        for report in reports
    ]
    return header, rows


def _shown(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _numbers(values: np.ndarray) -> list[float]:
    if not np.isfinite(values).all():
        raise ValueError("a value of an item is not finite")
    return [float(value) for value in values]
