"""Texts as sets of hashed shingles (runs of three words), on disk: what `near` compares.

All of it lies in files without a name: 8 bytes for each shingle, 20 for each row. Two different shingles are taken
for one with probability 2^-60.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedtune import keyed
from embedtune.data.clean import SHINGLE, words_hash
from embedtune.data.scratch import Column, Numbers, records

COLUMNS = 16  # told apart; their number stands in the top four bits of a shingle's hash
SHIFT = np.uint64(60)
BLOCK = 250_000  # words or shingles handled at once
ROWS = 1 << 16  # rows whose sizes are summed up at once
KNOWN_WORDS = 200_000  # whose hashes are kept at hand
PLACE = np.dtype([("start", np.int64), ("many", np.uint32)])


@dataclass(frozen=True)
class Sets:
    """Rows as sets of shingles: `places` (rows,) of PLACE says of each row how many hashes it has and from where on.

    A row's hashes are ascending uint64. `exact` (rows,) uint64 is equal for rows that are equal but for case and
    whitespace. `folder` is where scratch files go (None: the system's temporary folder).
    """

    hashes: Numbers
    places: Numbers
    exact: Numbers
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.places)

    def row(self, number: int) -> np.ndarray:
        """The shingles of one row."""
        start, many = self.places[number : number + 1][0].tolist()
        return self.hashes[start : start + many]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """How many shingles the rows have, (len(rows),) int64."""
        return self.places.take(rows)["many"].astype(np.int64)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shingles of several rows end to end, and for each the place of its row in `rows`.

        Rows that stand end to end in the file are read at once.
        """
        if not len(rows):
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        places = self.places.take(rows)
        starts, many = places["start"], places["many"].astype(np.int64)
        stops = starts + many
        apart = np.flatnonzero(starts[1:] != stops[:-1])
        edges = zip(starts[[0, *apart + 1]].tolist(), stops[[*apart, -1]].tolist())
        flat = np.concatenate([self.hashes[start:stop] for start, stop in edges])
        return flat, np.repeat(np.arange(len(rows)), many)

    def part(self, rows: np.ndarray) -> Sets:
        """Those rows as sets of their own; no shingle is copied."""
        return Sets(self.hashes, self.places.take(rows), self.exact.take(rows), self.folder)

    def blocks(self, rows: Numbers) -> Iterator[np.ndarray]:
        """`rows` in runs of about BLOCK shingles, at least one row each."""
        start = 0
        while start < len(rows):
            some = rows[start : start + ROWS]
            many = max(1, int(np.searchsorted(np.cumsum(self.sizes(some)), BLOCK, "right")))
            yield some[:many]
            start += many


class Shingler:
    """Takes rows one by one and gives their `Sets`.

    A row is a text, or the texts of its columns: rows of several columns are near when each column is. `folder` is
    where scratch files go (the system's temporary folder); without `disk` all stays in memory.
    """

    def __init__(self, folder: Path | None = None, *, disk: bool = True) -> None:
        self.folder = folder
        kinds = (np.uint64, PLACE, np.uint64)
        self.found = [Column(kind, folder) if disk else list[np.ndarray]() for kind in kinds]
        self.known: dict[str, int] = {}  # hashes of words
        self.end = 0  # shingles of the blocks before
        self._empty()

    def _empty(self) -> None:
        self.words: list[str] = []
        self.lengths: list[int] = []  # of the cells, in words
        self.columns: list[int] = []
        self.owners: list[int] = []
        self.exact: list[int] = []

    def add(self, cells: Sequence[str]) -> None:
        """Take one row."""
        found = [cell.casefold().split() for cell in cells]
        for column, words in enumerate(found):
            self.words += words or [""]
            self.lengths.append(len(words) or 1)
            self.columns.append(min(column, COLUMNS - 1))
            self.owners.append(len(self.exact))
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
        many = np.bincount(owner[new], minlength=len(self.exact))
        places = records(PLACE, start=self.end + np.cumsum(many) - many, many=many)
        for column, values in zip(self.found, (hashes[new], places, np.array(self.exact, np.uint64))):
            column.append(values)
        self.end += int(many.sum())
        self._empty()

    def done(self) -> Sets:
        """All that was taken; nothing may be added after."""
        self._flush()
        hashes, places, exact = (each if isinstance(each, Column) else np.concatenate(each) for each in self.found)
        return Sets(hashes, places, exact, self.folder)


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
