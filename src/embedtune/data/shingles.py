"""Texts as sets of hashed shingles (runs of three words), on disk: what `near` compares.

In memory stand 20 bytes for each row; the shingles, 8 bytes each, lie in a file without a name. Two different
shingles are taken for one with probability 2^-60.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from embedtune import files, keyed
from embedtune.data.clean import SHINGLE, words_hash

COLUMNS = 16  # told apart; their number stands in the top four bits of a shingle's hash
SHIFT = np.uint64(60)
BLOCK = 250_000  # words or shingles handled at once
ROWS = 1 << 16  # rows whose sizes are summed up at once
KNOWN_WORDS = 200_000  # whose hashes are kept at hand


class Hashes(Protocol):
    """An array of uint64, or a file that is one."""

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class _Scratch:
    """A file without a name that reads like an array of uint64."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __getitem__(self, part: slice, /) -> np.ndarray:
        self.file.seek(8 * part.start)
        return np.frombuffer(self.file.read(8 * (part.stop - part.start)), np.uint64)


@dataclass(frozen=True)
class Sets:
    """Rows as sets of shingles: row i is the `many[i]` hashes from starts[i] on, ascending uint64.

    `exact` (rows,) uint64 is equal for rows that are equal but for case and whitespace.
    """

    hashes: Hashes
    starts: np.ndarray
    many: np.ndarray
    exact: np.ndarray

    def __len__(self) -> int:
        return len(self.many)

    def row(self, number: int) -> np.ndarray:
        """The shingles of one row."""
        start = int(self.starts[number])
        return self.hashes[start : start + int(self.many[number])]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """How many shingles the rows have, (len(rows),) int64."""
        return self.many[rows].astype(np.int64)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shingles of several rows end to end, and for each the place of its row in `rows`."""
        flat = np.concatenate([np.zeros(0, np.uint64), *map(self.row, rows.tolist())])
        return flat, np.repeat(np.arange(len(rows)), self.sizes(rows))

    def part(self, rows: np.ndarray) -> Sets:
        """Those rows as sets of their own; no shingle is copied."""
        return Sets(self.hashes, self.starts[rows], self.many[rows], self.exact[rows])

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """`rows` in runs of about BLOCK shingles, at least one row each."""
        start = 0
        while start < len(rows):
            upto = np.cumsum(self.sizes(rows[start : start + ROWS]))
            stop = start + max(1, int(np.searchsorted(upto, BLOCK, "right")))
            yield rows[start:stop]
            start = stop


class Shingler:
    """Takes rows one by one and gives their `Sets`.

    A row is a text, or the texts of its columns: rows of several columns are near when each column is. `folder` is
    where the scratch file goes (the system's temporary folder); without `disk` the shingles stay in memory.
    """

    def __init__(self, folder: Path | None = None, *, disk: bool = True) -> None:
        self.place = folder or Path(tempfile.gettempdir())
        self.scratch = None
        if disk:
            with files.disk_errors(self.place):
                self.scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it goes when its reader goes
        self.parts: list[np.ndarray] = []
        self.known: dict[str, int] = {}  # hashes of words
        self.exact, self.sizes = array("Q"), array("I")
        self._empty()

    def _empty(self) -> None:
        self.words: list[str] = []
        self.lengths: list[int] = []  # of the cells, in words
        self.columns: list[int] = []
        self.owners: list[int] = []
        self.rows = 0

    def add(self, cells: Sequence[str]) -> None:
        """Take one row."""
        found = [cell.casefold().split() for cell in cells]
        for column, words in enumerate(found):
            self.words += words or [""]
            self.lengths.append(len(words) or 1)
            self.columns.append(min(column, COLUMNS - 1))
            self.owners.append(self.rows)
        self.rows += 1
        self.exact.append(_row_hash(found))
        if len(self.words) > BLOCK:
            self._flush()

    def _flush(self) -> None:
        if len(self.known) > KNOWN_WORDS:
            self.known.clear()
        self.known.update((word, words_hash([word])) for word in set(self.words).difference(self.known))
        words = np.fromiter(map(self.known.__getitem__, self.words), np.uint64, len(self.words))
        length = np.array(self.lengths, np.int64)
        cell = np.repeat(np.arange(len(length)), length)
        offset = np.arange(len(words)) - np.repeat(np.cumsum(length) - length, length)
        padded = np.concatenate([words, np.zeros(SHINGLE, np.uint64)])
        parts = [np.where(offset + k < length[cell], padded[k : len(words) + k], 0) for k in range(SHINGLE)]
        starts = offset < np.maximum(1, length[cell] - SHINGLE + 1)
        hashes, cell = keyed.key(*(part[starts] for part in parts)), cell[starts]
        hashes = (hashes >> np.uint64(64 - 60)) | (np.array(self.columns, np.uint64)[cell] << SHIFT)
        owner = np.array(self.owners, np.int64)[cell]
        order = np.lexsort((hashes, owner))
        hashes, owner = hashes[order], owner[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
        self.sizes.extend(np.bincount(owner[new], minlength=self.rows).tolist())
        if self.scratch:
            with files.disk_errors(self.place):
                self.scratch.write(hashes[new].tobytes())
        else:
            self.parts.append(hashes[new])
        self._empty()

    def done(self) -> Sets:
        """All that was taken; nothing may be added after."""
        self._flush()
        sizes, exact = np.asarray(self.sizes), np.asarray(self.exact)  # views: nothing is copied
        starts = np.cumsum(sizes, dtype=np.int64)
        starts -= sizes
        if self.scratch is None:
            return Sets(np.concatenate(self.parts), starts, sizes, exact)
        with files.disk_errors(self.place):
            self.scratch.flush()
        return Sets(_Scratch(self.scratch), starts, sizes, exact)


def sets_of(rows: Iterable[Sequence[str]], folder: Path | None = None, *, disk: bool = True) -> Sets:
    """`Sets` of rows, each the texts of its columns."""
    shingler = Shingler(folder, disk=disk)
    for cells in rows:
        shingler.add(cells)
    return shingler.done()


def _row_hash(cells: Sequence[Sequence[str]]) -> int:
    """64 bits over the words of all cells; the only cell of a row gives its `text_hash`."""
    numbers = [words_hash(words) for words in cells]
    if len(numbers) == 1:
        return numbers[0]
    return int.from_bytes(hashlib.blake2b(np.array(numbers, np.uint64).tobytes(), digest_size=8).digest(), "big")
