"""Batches: which rows fit into one forward pass, and which rows may stand in one batch at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embedtune.fit import order

WINDOW = 64  # batches among which a row may be moved to stand clear of its like


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int, padded: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows (of ascending `lengths` in tokens) that hold at most `max_tokens`, padding counted where it is."""
    first, real = 0, 0
    for number, length in enumerate(lengths):
        cost = int(length) * (number - first + 1) if padded else real + int(length)
        if number > first and cost > max_tokens:
            yield first, number
            first, real = number, 0
        real += int(length)
    yield first, len(lengths)


class DistinctOrder:
    """The data order of `order.batch_rows`, with no two rows of a batch alike in any column of `keys`.

    Rows are moved inside windows of `WINDOW` batches, so the order stays a function of (seed, step) that costs the
    same at any step. A row that finds no place in its window is left out of this epoch (`left_out`); the next
    epoch's order is another.
    """

    def __init__(self, keys: np.ndarray, batch: int, seed: int) -> None:
        """`keys` (n, c): numbers of the texts of each row that may not meet their like, such as anchor and positive."""
        self.keys, self.batch, self.seed = keys, batch, seed
        self.window: tuple[int, int] | None = None
        self.plan: list[np.ndarray] = []
        self.left_out = 0

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers (m,) int64) of optimizer step `step`; m is at most the batch."""
        epoch, index = divmod(step, order.steps_per_epoch(len(self.keys), self.batch))
        if self.window != (epoch, index // WINDOW):
            self.window = (epoch, index // WINDOW)
            self._arrange(epoch, index // WINDOW)
        return epoch, self.plan[index % WINDOW]

    def _arrange(self, epoch: int, window: int) -> None:
        """Each row goes to the first batch from its own on (around the window) that has room and none of its like."""
        first = epoch * order.steps_per_epoch(len(self.keys), self.batch) + window * WINDOW
        last = min(first + WINDOW, (epoch + 1) * order.steps_per_epoch(len(self.keys), self.batch))
        natural = [order.batch_rows(step, self.batch, len(self.keys), self.seed)[1] for step in range(first, last)]
        seen: list[set[tuple[int, int]]] = [set() for _ in natural]
        placed: list[list[int]] = [[] for _ in natural]
        self.left_out = 0
        for number, rows in enumerate(natural):
            for row in rows.tolist():
                mine = set(enumerate(self.keys[row].tolist()))
                for shift in range(len(natural)):
                    at = (number + shift) % len(natural)
                    if len(placed[at]) < self.batch and not (seen[at] & mine):
                        placed[at].append(row)
                        seen[at] |= mine
                        break
                else:
                    self.left_out += 1
        self.plan = [np.array(rows, np.int64) for rows in placed]
