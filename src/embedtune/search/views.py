"""Matrices that are put together, chosen from or restored as they are read, for `nearest.top_k`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Stacked:
    """Matrices of one width, one below the other."""

    parts: Sequence[Any]
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return sum(len(part) for part in self.parts), self.width

    def __getitem__(self, rows: Any) -> np.ndarray:
        ends = np.cumsum([len(part) for part in self.parts])
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.shape[0])
            pieces = [
                part[max(0, first - start) : last - start]
                for part, start, end in zip(self.parts, ends - [len(p) for p in self.parts], ends, strict=True)
                if first < end and last > start
            ]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros((0, self.width), np.float32)])
        rows = np.asarray(rows)
        owner = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), self.width), self.parts[0].dtype if self.parts else np.float32)
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(owner == number)
            out[here] = part[rows[here] - (ends[number] - len(part))]
        return out


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some rows of a matrix, by number."""

    matrix: Any
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""
        return len(self.rows), self.matrix.shape[1]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found: np.ndarray = self.matrix[self.rows[rows]]
        return found


@dataclass(frozen=True, eq=False)
class Restored:
    """Codes (N, C) that become float32 rows (N, width) as they are read."""

    codes: Any
    restore: Callable[[np.ndarray], np.ndarray]
    width: int
    dtype: Any = np.float32

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.restore(self.codes[rows])


def signs(codes: np.ndarray, dimension: int) -> np.ndarray:
    """Packed bits as -1 and 1: (B, D) float32, scaled to length one."""
    bits = np.unpackbits((codes.astype(np.int16) + 128).astype(np.uint8), axis=-1, count=dimension)
    return (2 * bits.astype(np.float32) - 1) / np.float32(np.sqrt(dimension))
