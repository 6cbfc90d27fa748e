"""Texts on disk, read and tokenised by number: for more lines than can be tokenised before training starts.

Three plain files hold them: the UTF-8 of all texts end to end, where each line begins and ends, and which line of which
document it is. The files are opened when lines are asked for and read there alone, so memory grows neither with
the number of lines nor with how many of them were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedtune import files
from embedtune.data.read import Row
from embedtune.data.tokens import Chunker

TEXTS, OFFSETS, PLACES = "texts.bin", "offsets.bin", "places.bin"
BYTES = 1 << 21  # of text that are written at once
OBJECT = 64  # bytes that a short text takes in memory beside itself
LINES = 1 << 16  # lines whose offsets are looked through at once
CHUNK = 1 << 40  # chunk number times this, plus the line, is what keys a row's noise


@dataclass(frozen=True)
class Spool:
    """Lines of text in a folder; all are known by their numbers from 0."""

    folder: Path
    lines: int

    def __len__(self) -> int:
        return self.lines

    def spans(self, numbers: np.ndarray) -> np.ndarray:
        """First byte and end of each line, (n, 2) int64."""
        found = _read(self.folder / OFFSETS, 8 * numbers, np.full(len(numbers), 16))
        return np.frombuffer(b"".join(found), np.int64).reshape(-1, 2)

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The texts of the lines ((n,) int64)."""
        spans = self.spans(numbers)
        return [text.decode() for text in _read(self.folder / TEXTS, spans[:, 0], spans[:, 1] - spans[:, 0])]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Of each line its document, and its number in that, (n, 2) int64."""
        found = _read(self.folder / PLACES, 16 * numbers, np.full(len(numbers), 16))
        return np.frombuffer(b"".join(found), np.int64).reshape(-1, 2)

    def all_places(self) -> Iterator[np.ndarray]:
        """`places` of all lines, block by block."""
        for first in range(0, self.lines, LINES):
            yield np.fromfile(self.folder / PLACES, np.int64, 2 * LINES, offset=16 * first).reshape(-1, 2)

    def having(self, texts: set[str]) -> Iterator[tuple[int, str]]:
        """Every line whose text is one of `texts`: its number and the text."""
        wanted = {text.encode() for text in texts}
        sizes = np.unique([len(text) for text in wanted])
        with open(self.folder / TEXTS, "rb") as file:
            for first in range(0, self.lines, LINES):
                offsets = np.fromfile(self.folder / OFFSETS, np.int64, LINES + 1, offset=8 * first)
                length = np.diff(offsets)
                likely = np.flatnonzero(np.isin(length, sizes))
                for number, start, size in zip(likely.tolist(), offsets[likely].tolist(), length[likely].tolist()):
                    file.seek(start)
                    if (text := file.read(size)) in wanted:
                        yield first + number, text.decode()


def spool(rows: Iterable[Row], folder: Path) -> Spool:
    """Write a stream of text rows into `folder`; memory stays flat."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        texts_file, offsets_file, places_file = (
            stack.enter_context(files.growing(folder / name)) for name in (TEXTS, OFFSETS, PLACES)
        )
        offsets_file.write(np.zeros(1, np.int64).tobytes())
        end, lines, last = 0, 0, np.array([-1, -1])
        for texts, documents in _blocks(rows):
            texts_file.write(b"".join(texts))
            ends = end + np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
            offsets_file.write(ends.tobytes())
            places = _places(np.array(documents, np.int64), last)
            places_file.write(places.tobytes())
            end, lines, last = int(ends[-1]), lines + len(texts), places[-1]
    return Spool(folder, lines)


def open_spool(folder: Path) -> Spool:
    """The lines that `spool` wrote."""
    return Spool(folder, (folder / OFFSETS).stat().st_size // 8 - 1)


@dataclass(frozen=True)
class LazyTokens:
    """Token rows of lines that are tokenised when they are asked for; stands in for `Tokens` in training.

    A row is named by its line, and a line gives all its chunks, or none where the tokenizer knows nothing of it.
    """

    spool: Spool
    chunker: Chunker

    def __len__(self) -> int:
        return len(self.spool)

    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of the lines, (n,) int64, which put them in nearly the order of their tokens."""
        return np.diff(self.spool.spans(numbers), axis=1)[:, 0]

    def rows(self, numbers: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of the lines' rows, the shortest first, and the number that keys each one's noise.

        That number is a function of line and chunk; of a line that is one row it is the line's.
        """
        found = [
            (row, line + CHUNK * chunk)
            for line, ids in zip(numbers.tolist(), self.chunker.encode(self.spool.texts(numbers)))
            for chunk, row in enumerate(self.chunker.rows(ids))
        ]
        found.sort(key=lambda each: len(each[0]))
        return [row for row, _ in found], np.array([number for _, number in found], np.int64)


def _blocks(rows: Iterable[Row]) -> Iterator[tuple[list[bytes], list[int]]]:
    """Texts and their documents, so many as are written at once."""
    texts: list[bytes] = []
    documents: list[int] = []
    size = 0
    for row in rows:
        text = row.values["text"].encode()
        texts.append(text)
        documents.append(row.document)
        size += len(text) + OBJECT
        if size > BYTES:
            yield texts, documents
            texts, documents, size = [], [], 0
    if texts:
        yield texts, documents


def _places(documents: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Document and line in it, (n, 2) int64, of lines that follow one whose document and line is `last`."""
    here = np.arange(len(documents))
    new = np.diff(documents, prepend=last[0]) != 0
    first = np.maximum.accumulate(np.where(new, here, -1 - last[1]))  # below 0 where it began before these lines
    return np.stack([documents, here - first], axis=1)


def _read(path: Path, starts: np.ndarray, sizes: np.ndarray) -> list[bytes]:
    """Pieces of a file."""
    found = []
    with open(path, "rb", buffering=0) as file:
        for start, size in zip(starts.tolist(), sizes.tolist()):
            file.seek(start)
            found.append(file.read(size))
    return found
