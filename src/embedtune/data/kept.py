"""Rows that are gone through several times, on disk: in memory stand 8 bytes for each, not Python objects."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from embedtune import files


class Texts(Protocol):
    """A list of texts, or one on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> str: ...


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows in a file without a name, a line of JSON each; `make` turns the values of one into what it stands for.

    Not for several threads at once.
    """

    file: IO[bytes]
    starts: np.ndarray  # (n,) int64: the first byte of each row
    make: Callable[..., Any]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Any:
        self.file.seek(int(self.starts[number]))
        return self.make(*json.loads(self.file.readline()))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def pick(self, numbers: np.ndarray) -> Kept:
        """Those with these numbers ((m,) int64 or bool (n,)); nothing is copied."""
        return replace(self, starts=self.starts[numbers])

    def read_as(self, make: Callable[..., Any]) -> Kept:
        """The same rows, taken for something else."""
        return replace(self, make=make)


def keep(rows: Iterable[Sequence[Any]], make: Callable[..., Any], folder: Path | None = None) -> Kept:
    """Write rows of plain values; the file lies in `folder` (the system's temporary one) as long as it is used."""
    place, starts, end = folder or files.scratch_folder(), array("q"), 0
    file = files.scratch(place)
    for row in rows:
        line = json.dumps(row).encode() + b"\n"
        with files.disk_errors(place):
            file.write(line)
        starts.append(end)
        end += len(line)
    with files.disk_errors(place):
        file.flush()
    return Kept(file, np.asarray(starts, np.int64), make)
