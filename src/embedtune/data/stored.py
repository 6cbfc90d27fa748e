"""Texts by id in a file without a name: a corpus that is read like a dict and does not stand in memory.

In memory are 24 to 36 bytes for each text, and the last few MB of what was added; less than that never meets the disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from embedtune import files

TAIL = 1 << 23  # bytes that are written at once
BLOCK = 1 << 20  # bytes that are read at once
HEAD = 4  # bytes that say how long an id is
FEWEST = 1 << 10  # slots of the hash table


class Stored(Mapping[str, str]):
    """A mapping from id to text that only grows, in the order in which the texts came.

    A hash table with open addressing finds an id by its hash, and what is found is compared with the id itself. Texts
    are read a block at a time where all are asked for in their order, else one by one. Raises UserError where the disk
    is full. `folder` is where the scratch file goes (the system's temporary folder); it is gone with its reader. Not
    for several threads at once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.scratch: IO[bytes] | None = None
        self.tail = bytearray()  # the last entries, which are not in the file yet
        self.ends = array("q", [0])  # where the entries end; the first begins at 0
        self.hashes = array("q")
        self.slots = array("I", bytes(FEWEST * array("I").itemsize))  # numbers of entries from 1; 0 is free
        self.block: dict[str, str] = {}  # what was read last of all in order

    def add(self, key: str, text: str) -> None:
        """Put in a text under an id that is not there yet."""
        number = len(self.hashes)
        if 2 * number >= len(self.slots):
            self._grow()
        name = key.encode("utf-8", "surrogatepass")
        entry = b"".join((len(name).to_bytes(HEAD, "little"), name, text.encode("utf-8", "surrogatepass")))
        self.hashes.append(hash_of(key))
        self._place(number)
        self.tail += entry
        self.ends.append(self.ends[-1] + len(entry))
        if len(self.tail) >= TAIL:
            self._write()

    def row(self, key: str) -> int:
        """The number of an id, from 0 in the order in which they came. Raises KeyError where it is not there."""
        return self._find(key)[0]

    def id(self, row: int) -> str:
        """The id with this number."""
        return self._entry(row)[0]

    def __getitem__(self, key: str) -> str:
        # Who reads values or items in order asks for the text of each id that was just given out.
        return self.block[key] if key in self.block else self._find(key)[1]

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self._find(key)[0] >= 0
        except KeyError:
            return False

    def __len__(self) -> int:
        return len(self.hashes)

    def __iter__(self) -> Iterator[str]:
        first = 0
        while first < len(self):
            block = dict(self._block(first))
            first += len(block)
            self.block = block
            yield from block

    def _find(self, key: str) -> tuple[int, str]:
        """Number and text of an id."""
        mask, wanted = len(self.slots) - 1, hash_of(key)
        slot = wanted & mask
        while number := self.slots[slot]:
            if self.hashes[number - 1] == wanted:
                found, text = self._entry(number - 1)
                if found == key:
                    return number - 1, text
            slot = (slot + 1) & mask
        raise KeyError(key)

    def _place(self, number: int) -> None:
        """Put the number of an entry into the first free slot from that of its hash on."""
        mask = len(self.slots) - 1
        slot = self.hashes[number] & mask
        while self.slots[slot]:
            slot = (slot + 1) & mask
        self.slots[slot] = number + 1

    def _grow(self) -> None:
        self.slots = array("I", bytes(2 * len(self.slots) * self.slots.itemsize))
        for number in range(len(self.hashes)):
            self._place(number)

    def _write(self) -> None:
        place = self.folder or files.scratch_folder()
        self.scratch = self.scratch or files.scratch(place)
        with files.disk_errors(place):
            self.scratch.seek(self.ends[-1] - len(self.tail))
            self.scratch.write(self.tail)
            self.scratch.flush()
        self.tail = bytearray()

    def _read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, which lie in the file or in the tail."""
        written = self.ends[-1] - len(self.tail)
        if start >= written or self.scratch is None:
            return bytes(self.tail[start - written : end - written])
        self.scratch.seek(start)
        return self.scratch.read(end - start)

    def _entry(self, row: int) -> tuple[str, str]:
        return _decoded(self._read(self.ends[row], self.ends[row + 1]))

    def _block(self, first: int) -> Iterable[tuple[str, str]]:
        """Ids and texts from entry `first` on: at least one, and about BLOCK bytes of them."""
        start, written = self.ends[first], self.ends[-1] - len(self.tail)
        last = first + 1
        while last < len(self) and self.ends[last + 1] - start <= BLOCK and (self.ends[last] != written):
            last += 1
        ends = self.ends[first : last + 1]
        found = self._read(start, ends[-1])
        return (_decoded(found[a - start : b - start]) for a, b in pairwise(ends))


@dataclass(frozen=True)
class StoredIds:
    """The ids of a `Stored` as a list of which each is read when it is asked for."""

    stored: Stored

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: int, /) -> str:
        return self.stored.id(row)


def hash_of(key: str) -> int:
    """The hash of an id, of 64 bits; nothing that is found depends on it."""
    return hash(key)


def _decoded(entry: bytes) -> tuple[str, str]:
    """Id and text."""
    size = HEAD + int.from_bytes(entry[:HEAD], "little")
    return entry[HEAD:size].decode("utf-8", "surrogatepass"), entry[size:].decode("utf-8", "surrogatepass")
