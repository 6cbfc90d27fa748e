"""The certificate of an erasure: what probes on fresh rows still find, what it cost, and what may be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from embedtune.refine.cost import Cost, Hubness, hubness
from embedtune.refine.nonlinear import Reading, independence, read_classes, read_values
from embedtune.refine.probes import (
    ALPHA,
    ASKED,
    Accuracy,
    Linear,
    basis,
    floor,
    linear_accuracy,
    linear_probe,
    rows_for,
)

Word = Literal["GUARDED", "TOO FEW ROWS", "LEAKS", "NOT ERASED"]
ENOUGH = 0.01  # of the variance: below it a leak is not called one
GUARD = 0.05  # of the variance: the upper limit up to which a concept is called guarded
FLOORS = 2  # times the floor: what is above cannot be put down to the few rows of the fit


@dataclass(frozen=True, eq=False)
class Target:
    """A concept on fresh rows: the columns z (m, k) that linear probes read, and what other probes have to tell.

    Those tell the classes `labels` (m,) where there are some; of several labels that may hold together (`several`) the
    one that is read best linearly; else the first column.
    """

    names: tuple[str, ...]
    z: np.ndarray
    labels: np.ndarray | None = None
    several: bool = False


@dataclass(frozen=True)
class Found:
    """What the probes found in one model's vectors of the fresh rows, best linear column and best other probe first."""

    rows: int
    dimensions: int
    linear: tuple[Linear, ...]
    accuracy: Accuracy | None  # of linear discriminants, where there are classes
    told: str  # what the probes that are not linear had to tell
    readings: tuple[Reading, ...]
    independence: float  # p
    hubness: Hubness

    @property
    def nothing(self) -> bool:
        """Whether every probe is at chance and the test of independence does not reject."""
        linear = all(column.p > ALPHA for column in self.linear)
        classes = self.accuracy is None or self.accuracy.low <= self.accuracy.chance
        return linear and classes and self.independence > ALPHA and not any(r.found for r in self.readings)


def find(x: np.ndarray, target: Target, tokens: np.ndarray, seed: int = 0) -> Found:
    """All probes on vectors x (m, d) of fresh texts of so many tokens (m,).

    Raises UserError for NaN, for a concept that does not vary, and for fewer than two rows per dimension.
    """
    q = basis(x)
    linear = sorted(linear_probe(q, target.z, target.names, seed=seed), key=lambda column: -column.bound)
    labels, told = target.labels, target.names[0]
    if target.several:
        told = linear[0].name
        labels = target.z[:, target.names.index(told)].astype(np.int64)
    elif labels is not None:
        told = "the classes"
    values = target.z[:, 0]
    readings = read_values(x, values, seed) if labels is None else read_classes(x, labels, seed)
    return Found(
        rows=len(x),
        dimensions=q.shape[1],
        linear=tuple(linear),
        accuracy=None if labels is None else linear_accuracy(q, labels, seed=seed),
        told=told,
        readings=tuple(readings),
        independence=independence(x, values, labels, seed=seed),
        hubness=hubness(x, tokens),
    )


@dataclass(frozen=True)
class Erasure:
    """What the model's folder says of the erasure; `residual` is what was left on the rows that it was fitted on.

    That is the largest covariance of the output with the concept, in standard deviations of both.
    """

    method: str
    rows: int
    live: int  # dimensions
    residual: float
    changed: bool  # whether the weights are other ones than those that were erased

    @property
    def floor(self) -> float:
        """What a fresh probe is bound to find of each column."""
        return floor(self.live, self.rows)


@dataclass(frozen=True)
class Certificate:
    """Everything that was measured; `after` is of the model, `before` of its base where one was given."""

    model: str
    base: str | None
    concept: str
    after: Found
    before: Found | None
    erasure: Erasure | None
    cost: Cost | None
    digests: Mapping[str, str | None]
    seed: int
    remarks: tuple[str, ...] = ()

    @property
    def word(self) -> Word:
        """LEAKS where more is left than the finite number of rows explains, GUARDED where next to nothing can be.

        TOO FEW ROWS: what may be left is explained by the number of rows, but it is not little. NOT ERASED.
        """
        if self.erasure is None:
            return "NOT ERASED"
        explained = max(ENOUGH, FLOORS * self.erasure.floor)
        if max(column.low for column in self.after.linear) > explained:
            return "LEAKS"
        return "GUARDED" if self.after.linear[0].bound <= GUARD else "TOO FEW ROWS"

    def sentences(self) -> list[str]:
        """The verdict in plain words: what holds, and beside it what does not."""
        return [*self._linear(), *self._other(), *self._floor(), *self._warnings()]

    def _linear(self) -> Iterator[str]:
        worst = self.after.linear[0]
        read = f"rho2 = {worst.shown:.4f} of {worst.name} (95 % interval {worst.low:.4f} to {worst.high:.4f})"
        on = f"a linear probe on {self.after.rows:,} fresh rows"
        if self.word == "GUARDED":
            yield f"linearly guarded up to rho2 <= {worst.bound:.4f} (95 %): {on} finds {read}"
        elif self.word == "TOO FEW ROWS":
            yield f"not shown to be guarded, rho2 may be up to {worst.bound:.4f} (95 %): {on} finds {read}"
            yield self._more_rows()
        elif self.word == "LEAKS":
            yield f"not linearly guarded: {on} finds {read}"
        else:
            yield f"nothing was erased from this model: {on} finds {read}"
        if self.before:
            old = next(column for column in self.before.linear if column.name == worst.name)
            yield f"before, it was rho2 = {old.shown:.4f} ({old.low:.4f} to {old.high:.4f})"
        if seen := self.after.accuracy:
            yield (
                f"linear discriminants tell the classes with a balanced accuracy of {seen.value:.3f} "
                f"({seen.low:.3f} to {seen.high:.3f}); chance is {seen.chance:.3f}"
            )

    def _more_rows(self) -> str:
        assert self.erasure  # the word says so
        n, needed = self.erasure.rows, rows_for(self.erasure.live, GUARD)
        if n < needed:
            return (
                f"with {n:,} fit rows a fresh linear probe finds about {self.erasure.floor:.4f} by chance alone; "
                f"fit on at least {needed:,} rows for {GUARD:g} or less"
            )
        return "more fresh rows make the interval narrower, more rows of the fit lower what is left"

    def _other(self) -> Iterator[str]:
        found, best = self.after, self.after.readings[0]
        measure = "balanced accuracy" if best.chance else "R2"
        words = f"{measure} = {best.value:.3f} ({best.low:.3f} to {best.high:.3f}) of {found.told}"
        chance = f"; chance is {best.chance:.3f}" if best.chance else ""
        if best.found:
            still = "still recovers" if self.erasure else "recovers"
            yield f"a non-linear probe ({best.probe}) {still} {words}{chance}"
        else:
            yield f"no non-linear probe finds anything; the best ({best.probe}) has {words}{chance}"
        if found.nothing:
            yield (
                f"no information on {self.concept} was found: all probes are at chance, and the test of independence "
                f"does not reject (p = {found.independence:.3f}); more rows or other probes may find some"
            )
        elif found.independence <= ALPHA:
            yield f"the vectors are not independent of {self.concept} (p = {found.independence:.3f})"
        else:
            yield f"a probe finds something; the test of independence does not reject (p = {found.independence:.3f})"

    def _floor(self) -> Iterator[str]:
        if erasure := self.erasure:
            yield f"on the rows of the fit the largest covariance left is {erasure.residual:.1e} ({erasure.method})"
            yield (
                f"an erasure fitted on {erasure.rows:,} rows of {erasure.live:,} dimensions leaves rho2 of about "
                f"{erasure.floor:.4f} to a fresh probe; for {ENOUGH:g} it needs {rows_for(erasure.live, ENOUGH):,} rows"
            )

    def _warnings(self) -> Iterator[str]:
        if self.erasure and self.erasure.changed:
            yield "the weights changed after the erasure: these figures hold, those of erasure.json do not; erase again"
        if self.after.rows < ASKED * self.after.dimensions:
            yield (
                f"{self.after.rows:,} rows are few for {self.after.dimensions:,} dimensions, so the interval is wide; "
                f"give {ASKED * self.after.dimensions:,}"
            )
        yield from self.remarks

    def figures(self) -> list[list[str]]:
        """Rows of name, before, after: every figure that both have, '-' where there is no base."""
        pairs = [(f"{c.name}, linear rho2", c, _by_name(self.before, c.name)) for c in self.after.linear]
        rows = [[name, _rho2(old), _rho2(new)] for name, new, old in pairs]
        old = self.before
        if self.after.accuracy:
            rows.append(
                ["linear balanced accuracy", _scored(old.accuracy if old else None), _scored(self.after.accuracy)]
            )
        for reading in self.after.readings:
            was = next((r for r in old.readings if r.probe == reading.probe), None) if old else None
            rows.append([f"{self.after.told}, {reading.probe}", _scored(was), _scored(reading)])
        rows.append(
            ["test of independence, p", f"{old.independence:.3f}" if old else "-", f"{self.after.independence:.3f}"]
        )
        rows.append(["hubness by length", _scored(old.hubness if old else None), _scored(self.after.hubness)])
        return rows

    def costs(self) -> list[str]:
        """What changed for tasks and for the vectors as a whole, in words."""
        if not self.cost:
            return []
        moved = self.cost.moved
        return [
            *(
                f"{task.measure} on {task.data}: {task.before:.4f} -> {task.after:.4f} ({task.difference.value:+.4f}, "
                f"95 % interval {task.difference.low:+.4f} to {task.difference.high:+.4f})"
                for task in self.cost.tasks
            ),
            f"cosines of {moved.texts:,} texts moved by {moved.cosine_change:.4f} in the mean, rank correlation "
            f"{moved.rank_correlation:.4f}, {moved.overlap:.1%} of the ten nearest neighbours are the same",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        floors = (
            {"floor": self.erasure.floor, "rows_for_one_percent": rows_for(self.erasure.live, ENOUGH)}
            if self.erasure
            else {}
        )
        return {"verdict": self.word, "sentences": self.sentences(), "costs": self.costs(), **floors, **asdict(self)}


def _by_name(found: Found | None, name: str) -> Linear | None:
    return next((column for column in found.linear if column.name == name), None) if found else None


def _rho2(column: Linear | None) -> str:
    return f"{column.shown:.4f} ({column.low:.4f} to {column.high:.4f})" if column else "-"


def _scored(score: Accuracy | Reading | Hubness | None) -> str:
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})" if score else "-"
