"""Distinct texts and their vectors on disk, by number: what negatives are looked for among.

In memory stand 16 bytes for each text. Files are read where something is asked for, not mapped: the pages of a map that
is read as a whole are memory like any other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedtune.data.clean import text_hash
from embedtune.data.read import Row
from embedtune.data.spool import Spool, spool
from embedtune.nearest import Scratch


@dataclass(frozen=True, eq=False)
class Candidates:
    """Texts that differ in more than case and whitespace, numbered from 0 in the order in which they came."""

    spooled: Spool
    lines: np.ndarray  # (N,) uint32: where each text stands among all that came
    hashes: np.ndarray  # (N,) uint64, ascending
    numbers: np.ndarray  # (N,) uint32: the text of each hash

    @classmethod
    def gather(cls, texts: Iterable[str], folder: Path) -> Candidates:
        """Write the texts into `folder`; of those that are the same the first stays."""
        hashes = array("Q")

        def rows() -> Iterator[Row]:
            for number, text in enumerate(texts):
                hashes.append(text_hash(text))
                yield Row({"text": text}, "", number, number)

        spooled = spool(rows(), folder)
        ordered, first = np.unique(np.asarray(hashes), return_index=True)
        lines = np.sort(first)
        return cls(spooled, lines.astype(np.uint32), ordered, np.searchsorted(lines, first).astype(np.uint32))

    def __len__(self) -> int:
        return len(self.lines)

    def number(self, key: int) -> int | None:
        """The number of the text that has this `text_hash`, if there is one."""
        at = int(np.searchsorted(self.hashes, np.uint64(key)))
        return int(self.numbers[at]) if at < len(self) and int(self.hashes[at]) == key else None

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The texts with these numbers ((n,) int64)."""
        return self.spooled.texts(self.lines[numbers].astype(np.int64))


@dataclass(frozen=True, eq=False)
class Vectors:
    """A `nearest.Scratch` whose file has a name, and is open only while it is read."""

    path: Path
    shape: tuple[int, int]

    def __getitem__(self, rows: Any) -> np.ndarray:
        with open(self.path, "rb") as file:
            return Scratch(file, self.shape)[rows]
