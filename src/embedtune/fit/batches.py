"""Batches: which rows fit into one forward pass, and which rows may stand in one batch at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embedtune.fit import order
from embedtune.keyed import key, permutation

WINDOW = 64  # batches among which a row may be moved to stand clear of its like, or beside rows of its length
TURN = 3  # what a key is for: in which turn the batches of a window come


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int, padded: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows (of ascending `lengths` in tokens) that hold at most `max_tokens`, padding counted where it is."""
    if not len(lengths):
        return
    first, real = 0, 0
    for number, length in enumerate(lengths):
        cost = int(length) * (number - first + 1) if padded else real + int(length)
        if number > first and cost > max_tokens:
            yield first, number
            first, real = number, 0
        real += int(length)
    yield first, len(lengths)


class DistinctOrder:
    """The data order of `order.batch_rows`, with no two rows of a batch alike in either column of `keys`.

    Rows are moved inside windows of `WINDOW` batches, so the order stays a function of (seed, step) that costs the
    same at any step. A row is left out of its epoch only where one of its texts stands in more rows of the window
    than it has batches (`left_out` counts them); the next epoch's order is another.
    With `lengths` the rows of a window are dealt to its batches by length, and the batches come in a keyed order.
    """

    def __init__(self, keys: np.ndarray, batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        """`keys` (n, 2): numbers of the two texts of each row that may not meet their like: anchor and positive.

        `lengths` (n,): of the texts that are to meet others of their length, in tokens.
        """
        self.keys, self.batch, self.seed, self.lengths = keys, batch, seed, lengths
        self.window: tuple[int, int] | None = None
        self.plan: list[np.ndarray] = []
        self.left_out = 0  # of the window that was asked for last

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return order.steps_per_epoch(len(self.keys), self.batch)

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers (m,) int64) of optimizer step `step`; m is at most the batch."""
        epoch, index = divmod(step, self.steps)
        if self.window != (epoch, index // WINDOW):
            self._arrange(epoch, index // WINDOW)
        return epoch, self.plan[index % WINDOW]

    def left_out_of(self, epoch: int) -> int:
        """Rows that find no place in this epoch; only windows where a text is too frequent are looked at."""
        found = 0
        for window in range(-(-self.steps // WINDOW)):
            natural = self._natural(epoch, window)
            rows = np.concatenate(natural)
            if any(np.unique(column, return_counts=True)[1].max() > len(natural) for column in self.keys[rows].T):
                self._arrange(epoch, window)
                found += self.left_out
        return found

    def _natural(self, epoch: int, window: int) -> list[np.ndarray]:
        """The batches as `order.batch_rows` gives them, all of a window at once; with `lengths` by length."""
        size = len(self.keys)
        places = np.arange(window * WINDOW * self.batch, min((window + 1) * WINDOW * self.batch, size))
        rows = permutation(places, size, self.seed, epoch)
        if self.lengths is not None:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        return np.split(rows, range(self.batch, len(places), self.batch))

    def _arrange(self, epoch: int, window: int) -> None:
        """The plan of a window."""
        self.window, self.left_out = (epoch, window), 0
        self.plan = self._apart(self._natural(epoch, window))
        if self.lengths is not None:  # else every window would run from short texts to long ones
            turns = np.argsort(key(self.seed, TURN, epoch, window, np.arange(len(self.plan))), kind="stable")
            self.plan = [self.plan[turn] for turn in turns]

    def _apart(self, plan: list[np.ndarray]) -> list[np.ndarray]:
        """Each row goes to the first batch from its own on (around the window) that has room and none of its like."""
        if all(len(np.unique(column)) == len(rows) for rows in plan for column in self.keys[rows].T):
            return plan
        batches = [_Batch(self.keys) for _ in plan]
        for number, rows in enumerate(plan):
            for row in rows.tolist():
                ends = _ends(self.keys, row)
                for batch in batches[number:] + batches[:number]:
                    if len(batch.rows) < self.batch and not any(end in batch.at for end in ends):
                        batch.add(row)
                        break
                else:
                    self.left_out += not _squeeze(row, ends, batches, self.batch)
        return [np.array(list(batch.rows), np.int64) for batch in batches]


End = tuple[int, int]  # a column, and the number of a text in it


def _ends(keys: np.ndarray, row: int) -> tuple[End, End]:
    return (0, int(keys[row, 0])), (1, int(keys[row, 1]))


class _Batch:
    """The rows of a batch (in the order in which they came), and which of them has a text."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys
        self.rows: dict[int, tuple[End, End]] = {}
        self.at: dict[End, int] = {}

    def add(self, row: int) -> None:
        self.rows[row] = ends = _ends(self.keys, row)
        self.at.update(dict.fromkeys(ends, row))

    def remove(self, row: int) -> None:
        for end in self.rows.pop(row):
            del self.at[end]


def _squeeze(row: int, ends: tuple[End, End], batches: list[_Batch], most: int) -> bool:
    """Place a row by moving others; False where one of its texts stands in every batch.

    Anchors and positives are the two sides of a graph, rows its edges, batches colours of edges: the proof of Konig's
    theorem (1916), that as many colours suffice as the most frequent text has rows, is the procedure.
    """
    free = [[batch for batch in batches if end not in batch.at] for end in ends]
    if not all(free):
        return False
    both = [batch for batch in free[0] if ends[1] not in batch.at]
    one = both[0] if both else free[0][0]
    if not both:
        _swap(_chain(ends[1], one, free[1][0]), one, free[1][0])
    one.add(row)
    # A batch of one row too many gives one to the smallest, by another chain.
    full = next((batch for batch in batches if len(batch.rows) > most), None)
    if full is not None:
        small = min(batches, key=lambda batch: len(batch.rows))
        starts = (end for ends in list(full.rows.values()) for end in ends if end not in small.at)
        chains = (_chain(end, full, small) for end in starts)
        _swap(next(chain for chain in chains if len(chain) % 2), full, small)
    return True


def _chain(end: End, one: _Batch, other: _Batch) -> list[int]:
    """Rows of `one` and `other` in turn, each sharing a text with the next, from `end`, which `other` has not."""
    found: list[int] = []
    while (row := one.at.get(end)) is not None:
        found.append(row)
        end = next(mine for mine in one.rows[row] if mine != end)
        one, other = other, one
    return found


def _swap(chain: list[int], one: _Batch, other: _Batch) -> None:
    """Rows of a chain change sides: those at even places are of `one`."""
    for number, row in enumerate(chain):
        (other if number % 2 else one).remove(row)
    for number, row in enumerate(chain):
        (one if number % 2 else other).add(row)
