"""Numbers of rows in files without a name: added to at the end, read in blocks, so that they take no memory.

`Column` is an array in such a file, `Parted` records that are put into parts by a key, which is how more of them are
sorted than fit into memory. The pages of these files are the system's cache, not the process's own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embedtune import files

READ = 1 << 16  # items read at once
PAGE = 512  # items that are read to get one of them
PART = 1 << 18  # records in a part, about: so many are sorted in memory


class Numbers(Protocol):
    """An array, or a file that is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...

    def __array__(self, dtype: Any = None, /) -> np.ndarray: ...

    def take(self, rows: np.ndarray, /) -> np.ndarray:
        """The items at `rows`, a copy."""
        ...


class Column:
    """An array in a file without a name, which goes with its last reader.

    `kind` is the dtype of its items; `folder` is where the file goes (the system's temporary folder). What the disk
    refuses is a UserError.
    """

    def __init__(self, kind: Any, folder: Path | None = None) -> None:
        self.kind = np.dtype(kind)
        self.place = folder or files.scratch_folder()
        self.file = files.scratch(self.place)
        self.many = 0

    def append(self, values: np.ndarray) -> None:
        """Add items at the end."""
        with files.disk_errors(self.place):
            self.file.write(values.astype(self.kind, copy=False).tobytes())
            self.file.flush()
        self.many += len(values)

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, part: slice, /) -> np.ndarray:
        start, stop, _ = part.indices(self.many)
        return np.frombuffer(self.read(start, stop), self.kind)

    def read(self, start: int, stop: int) -> bytes:
        """The items from `start` to before `stop`, as they stand in the file."""
        size = self.kind.itemsize
        return os.pread(self.file.fileno(), size * max(0, stop - start), size * start)

    def __setitem__(self, number: int, value: int) -> None:
        with files.disk_errors(self.place):
            os.pwrite(self.file.fileno(), self.kind.type(value).tobytes(), self.kind.itemsize * number)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.empty(self.many, self.kind)
        for first, block in blocks(self):
            found[first : first + len(block)] = block
        return found if dtype is None else found.astype(dtype, copy=False)

    def take(self, rows: np.ndarray, /) -> np.ndarray:
        """The items at `rows`, in any order; those that stand close together are read at once."""
        found = np.empty(len(rows), self.kind)
        order = np.argsort(rows, kind="stable")
        pages, places = np.divmod(rows[order], PAGE)
        edges = (np.flatnonzero(pages[1:] != pages[:-1]) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(rows)] if len(rows) else ()):
            first = int(pages[start]) * PAGE
            found[order[start:stop]] = self[first : first + PAGE][places[start:stop]]
        return found

    def mapped(self) -> mmap.mmap:
        """The file as memory to write to; it must not be empty."""
        return mmap.mmap(self.file.fileno(), self.many * self.kind.itemsize)


def zeros(kind: Any, size: int, folder: Path | None = None) -> Column:
    """A column of zeros that are written, so that a full disk is an error here and not a signal where it is mapped."""
    column = Column(kind, folder)
    for start in range(0, size, READ):
        column.append(np.zeros(min(READ, size - start), column.kind))
    return column


def blocks(numbers: Numbers) -> Iterator[tuple[int, np.ndarray]]:
    """All items in blocks of READ, each with the number of its first."""
    for first in range(0, len(numbers), READ):
        yield first, numbers[first : first + READ]


def parts_for(records: int) -> int:
    """How many parts keep each at about PART records."""
    return max(1, -(-records // PART))


def records(kind: np.dtype, **fields: np.ndarray) -> np.ndarray:
    """Columns of one length side by side."""
    found = np.empty(len(next(iter(fields.values()))), kind)
    for name, values in fields.items():
        found[name] = values
    return found


class Parted:
    """Records in parts; in each they stand in the order in which they were added.

    They are gathered until there are PART of them, and stand together in one file then, part after part; where a part
    begins is known for each time. So in memory stand 8 bytes for each time and part: for n records 8 (n / PART)^2.
    """

    def __init__(self, kind: np.dtype, parts: int, folder: Path | None = None) -> None:
        self.records, self.parts = Column(kind, folder), parts
        self.edges: list[np.ndarray] = []
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, some: np.ndarray, part: np.ndarray) -> None:
        """Put each of `some` records into its `part`, (n,) of 0 to parts - 1."""
        self.waiting.append((some, part))
        if sum(len(each) for each, _ in self.waiting) >= PART:
            self._write()

    def _write(self) -> None:
        some, part = map(np.concatenate, zip(*self.waiting))
        order = np.argsort(part, kind="stable")
        self.edges.append(len(self.records) + np.searchsorted(part[order], np.arange(self.parts + 1)))
        self.records.append(some[order])
        self.waiting.clear()

    def part(self, number: int) -> Iterator[np.ndarray]:
        """The records of a part, in one block, or in several where it has come out much larger than PART."""
        if self.waiting:
            self._write()
        some: list[bytes] = []
        many = 0
        for edges in self.edges:
            start, stop = edges[number : number + 2].tolist()
            some.append(self.records.read(start, stop))
            many += stop - start
            if many >= 2 * PART:
                yield np.frombuffer(b"".join(some), self.records.kind)
                some, many = [], 0
        if many:
            yield np.frombuffer(b"".join(some), self.records.kind)
