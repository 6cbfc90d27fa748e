"""Which words stand in which texts, on disk: what the scores by words are made of.

In memory stand the words, and one block of texts or one part of the postings (a word, a text, how often it stands
there); all others lie in a file without a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

import numpy as np

BLOCK = 1 << 21  # characters of the texts that are taken at once
PART = 1 << 19  # postings that are given back at once
POSTING = np.dtype([("word", np.int32), ("text", np.int32), ("times", np.int32), ("length", np.int32)])
LOW = (1 << 32) - 1


@dataclass(eq=False)
class Postings:
    """The postings of texts that are added a block at a time; each block lies in the file by word and then by text."""

    scratch: IO[bytes]
    words: dict[str, int] = field(default_factory=dict)  # and their numbers, in the order in which they came up
    often: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (words,): in how many texts
    sizes: list[int] = field(default_factory=list)  # of the blocks
    texts: int = 0
    length: int = 0  # of all texts, in words

    def add(self, texts: list[str]) -> None:
        """Take the words of some texts, as bm25s parts them."""
        import bm25s

        found = bm25s.tokenize(texts, stopwords=None, show_progress=False)
        number = np.array([self.words.setdefault(word, len(self.words)) for word in found.vocab], np.int64)
        lengths = np.array([len(each) for each in found.ids], np.int64)
        word = number[np.fromiter(chain.from_iterable(found.ids), np.int64, int(lengths.sum()))]
        pairs, times = np.unique(word << 32 | np.repeat(np.arange(len(texts)), lengths), return_counts=True)
        block, text = np.empty(len(pairs), POSTING), pairs & LOW
        block["word"], block["text"] = pairs >> 32, self.texts + text
        block["times"], block["length"] = times, lengths[text]
        self.scratch.write(block.tobytes())
        often = np.bincount(block["word"], minlength=len(self.words))
        often[: len(self.often)] += self.often
        self.often = often
        self.sizes.append(len(block))
        self.texts += len(texts)
        self.length += int(lengths.sum())

    def parts(self) -> Iterator[np.ndarray]:
        """All postings, by word and then by text, at most about PART of them at once."""
        bounds = self._bounds()
        starts = np.cumsum([0, *self.sizes])[:-1]
        at = np.array([start + np.searchsorted(self._read(start, size)["word"], bounds)
                       for start, size in zip(starts, self.sizes)])  # fmt: skip
        for number in range(len(bounds) - 1):
            waiting: list[np.ndarray] = []
            for first, last in zip(at[:, number], at[:, number + 1]):
                piece = self._read(first, last - first)
                # So much there is of one word alone, whose postings are in order as they come.
                if sum(map(len, waiting)) + len(piece) > PART and waiting:
                    yield _sorted(waiting)
                    waiting = []
                waiting.append(piece)
            yield _sorted(waiting)

    def _bounds(self) -> np.ndarray:
        """Numbers of words between which there are at most PART postings, or those of one word: from 0 to the last."""
        ends, bounds = np.cumsum([0, *self.often]), [0]
        while bounds[-1] < len(self.often):
            last = int(np.searchsorted(ends, ends[bounds[-1]] + PART, side="right")) - 1
            bounds.append(max(last, bounds[-1] + 1))
        return np.array(bounds)

    def _read(self, start: int, size: int) -> np.ndarray:
        self.scratch.seek(int(start) * POSTING.itemsize)
        return np.frombuffer(self.scratch.read(int(size) * POSTING.itemsize), POSTING)


def blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about BLOCK characters."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text) + 1
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _sorted(pieces: list[np.ndarray]) -> np.ndarray:
    """Pieces of blocks as one, by word; within a word the texts keep their order, which is that of the blocks."""
    postings = np.concatenate(pieces)
    found: np.ndarray = postings[np.argsort(postings["word"], kind="stable")]
    return found
