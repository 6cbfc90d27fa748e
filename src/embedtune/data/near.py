"""Texts that nearly repeat each other, found exactly and in bounded memory.

Two texts are near when the Jaccard overlap of their 3-word shingles is at least a threshold t. Then they share at
least t of either's shingles, so that one of those shared is among the n - ceil(t n) + 1 rarest of each (prefix
filtering: Bayardo, Ma, Srikant, WWW 2007). Only rows that have enough such rare shingles in common are compared, and
those exactly. So no pair is missed by chance, as it would be with MinHash. The one limit is CROWD, which is reached
by form letters only.

Beside the shingles (see `shingles`) there are in memory a table of at most 32 MiB, 8 bytes for each row, and about 28
for each rare shingle that more than one row seems to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from embedtune.data.shingles import COLUMNS, SHIFT, Sets

CROWD = 200  # rows that are kept for a rare shingle, unless a row has a rarer one: beyond, it is boilerplate
TABLE_BITS = 25  # the largest table of counts
CAREFUL = 1e-9  # products such as 0.8 * 15 may come out above the whole number that they are


def leaders(sets: Sets, near: float | None) -> np.ndarray:
    """(rows,) uint32: for each row the row that it repeats, exactly or nearly, or itself.

    Rows are taken in order; each is given to the first row that is itself not given away and is near enough. So
    every row is near the one it is given to, and rows that are not given away are not near each other. Without
    `near` only exact repeats count.
    """
    label, distinct = _exact(sets)
    for row, groups, index in _suspects(sets, distinct, near):
        others = np.sort(index.candidates(len(sets.row(row)), groups))
        found = others[_near(sets.row(row), *sets.gather(others), index.near)]
        if len(found):
            label[row] = found[0]
        else:
            index.insert(row, groups)
    return label[label]


def components(sets: Sets, near: float | None) -> np.ndarray:
    """(rows,) int64: the first row of each row's component, where rows that repeat each other are joined.

    Rows of different components are not near each other.
    """
    label, distinct = _exact(sets)
    parent = list(range(len(sets)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, groups, index in _suspects(sets, distinct, near):
        others = index.candidates(len(sets.row(row)), groups)
        # A few first: where all are alike, they bring the row into the component of all the others.
        for some in (others[:1], others[1:9], others[9:]):
            mine = root(row)
            some = np.array([other for other in some.tolist() if root(other) != mine], np.int64)
            for other in some[_near(sets.row(row), *sets.gather(some), index.near)].tolist():
                a, b = sorted((root(row), root(other)))
                parent[b] = a
        index.insert(row, groups)
    return np.array([root(row) for row in range(len(sets))], np.int64)[label]


@dataclass(frozen=True)
class Repeats:
    """Which rows also stand somewhere else: (rows,) bool each, and (rows,) int64 where, if they do."""

    exact: np.ndarray
    near: np.ndarray
    where: np.ndarray


def repeated(rows: Sets, others: Iterable[Sets], near: float | None) -> Repeats:
    """Which of `rows` repeat one of `others`, exactly or else nearly; `others` are numbered across their blocks.

    Memory is bounded by `rows` and one block of the others; no limit and no chance is involved.
    """
    label, distinct = _exact(rows)
    exact, close, where = np.zeros(len(rows), bool), np.zeros(len(rows), bool), np.zeros(len(rows), np.int64)
    order = distinct[np.argsort(rows.exact[distinct])]
    keys = rows.exact[order]
    find = _finder(rows, distinct, near) if near is not None else None
    seen = 0
    for block in others if len(rows) else ():
        for number, found in find(block, close) if find else ():
            where[found], close[found] = seen + number, True
        place = np.minimum(np.searchsorted(keys, block.exact), len(keys) - 1)
        fresh = (keys[place] == block.exact) & ~exact[order[place]]
        numbers = np.flatnonzero(fresh)[::-1]  # so that of several the first is written last
        hits = order[place[numbers]]
        where[hits], exact[hits] = seen + numbers, True
        seen += len(block)
    return Repeats(exact[label], (close & ~exact)[label], where[label])


def _finder(
    rows: Sets, distinct: np.ndarray, near: float
) -> Callable[[Sets, np.ndarray], Iterator[tuple[int, np.ndarray]]]:
    """A function of a block and of the rows already found: the numbers in the block, and the rows near them."""
    counts = _Counts(int(rows.sizes(distinct).sum()))
    for part in rows.blocks(distinct):
        counts.add(rows.gather(part)[0])
    tokens, owner = _prefixes(rows, distinct, counts, near, 1)
    tokens, group, many = np.unique(tokens, return_inverse=True, return_counts=True)
    index = _Index(rows, near, many)
    index.fill(owner, group)

    def find(block: Sets, done: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        everything = np.arange(len(block))
        flat, owner = block.gather(everything)
        known = np.bincount(owner[counts[flat] > 0], minlength=len(block))
        likely = np.flatnonzero(known >= _least(near, block.sizes(everything)))
        wanted, numbers = _prefixes(block, likely, counts, near, 1)
        place = np.minimum(np.searchsorted(tokens, wanted), len(tokens) - 1)
        there = tokens[place] == wanted
        for number, groups in _by_row(numbers[there], place[there]):
            own = block.row(number)
            others = index.candidates(len(own), groups)
            others = others[~done[others]]
            yield number, others[_near(own, *rows.gather(others), near)]

    return find


def _exact(sets: Sets) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first that equals it; and the rows that equal no earlier one."""
    order = np.argsort(sets.exact, kind="stable")
    ordered = sets.exact[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    label = np.arange(len(sets), dtype=np.uint32)
    label[order[again]] = order[np.searchsorted(ordered, ordered[again])]
    fresh = np.ones(len(sets), bool)
    fresh[order[again]] = False
    return label, np.flatnonzero(fresh).astype(np.uint32)


def _near(own: np.ndarray, flat: np.ndarray, owner: np.ndarray, near: float) -> np.ndarray:
    """For each of the rows whose shingles are `flat`: whether all its columns are near those of `own`."""
    if not len(flat):
        return np.zeros(0, bool)
    many = int(owner[-1]) + 1
    shared = own[np.minimum(np.searchsorted(own, flat), len(own) - 1)] == flat
    cell = owner * COLUMNS + (flat >> SHIFT).astype(np.int64)
    common = np.bincount(cell[shared], minlength=many * COLUMNS).reshape(many, COLUMNS)
    theirs = np.bincount(cell, minlength=many * COLUMNS).reshape(many, COLUMNS)
    mine = np.bincount((own >> SHIFT).astype(np.int64), minlength=COLUMNS)
    union = mine + theirs - common
    similarity = np.where(union > 0, common / np.maximum(union, 1), 1.0)
    return np.all(similarity >= near, axis=1)


class _Counts:
    """In how many rows a shingle stands, at least: shingles that share a place are counted together."""

    def __init__(self, size: int) -> None:
        bits = min(TABLE_BITS, max(10, (4 * size).bit_length()))
        self.table = np.zeros(1 << bits, np.uint8)
        self.mask = np.uint64((1 << bits) - 1)

    def add(self, hashes: np.ndarray) -> None:
        place, many = np.unique(hashes & self.mask, return_counts=True)
        self.table[place] = np.minimum(self.table[place] + many, 255)

    def __getitem__(self, hashes: np.ndarray) -> np.ndarray:
        return self.table[hashes & self.mask]


def _least(near: float, sizes: np.ndarray) -> np.ndarray:
    """Of so many shingles, how many at least a near row shares."""
    return np.ceil(near * sizes - CAREFUL).astype(np.int64)


def _rarest(counts: _Counts, sizes: np.ndarray, flat: np.ndarray, owner: np.ndarray, near: float) -> np.ndarray:
    """Places in `flat` of each row's n - ceil(t n) + 1 rarest shingles, row by row; the same order for all rows."""
    order = np.lexsort((flat, counts[flat], owner))
    rank = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[rank < np.repeat(sizes - _least(near, sizes) + 1, sizes)]


def _prefixes(sets: Sets, rows: np.ndarray, counts: _Counts, near: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The rarest shingles of the rows that stand in `least` rows or seem to, and the row of each, row by row."""
    tokens, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    for block in sets.blocks(rows):
        flat, owner = sets.gather(block)
        chosen = _rarest(counts, sets.sizes(block), flat, owner, near)
        chosen = chosen[counts[flat[chosen]] >= least]
        tokens.append(flat[chosen])
        owners.append(block[owner[chosen]].astype(np.uint32))
    return np.concatenate(tokens), np.concatenate(owners)


class _Index:
    """For each rare shingle the rows that have it, as far as they were inserted; `many` is how many there can be."""

    def __init__(self, sets: Sets, near: float, many: np.ndarray) -> None:
        self.sets, self.near = sets, near
        self.start = np.cumsum(many) - many
        self.filled = np.zeros(len(many), np.int64)
        self.rows = np.zeros(int(many.sum()), np.uint32)

    def insert(self, row: int, groups: np.ndarray) -> None:
        """Let `row` be found by the shingles `groups`."""
        filled = self.filled[groups]
        if filled.min() < CROWD:
            groups = groups[filled < 4 * CROWD]
            self.rows[self.start[groups] + self.filled[groups]] = row
            self.filled[groups] += 1

    def fill(self, rows: np.ndarray, groups: np.ndarray) -> None:
        """Insert all rows at once, and without a limit."""
        self.rows = rows[np.argsort(groups, kind="stable")]
        self.filled = np.bincount(groups, minlength=len(self.start))

    def candidates(self, size: int, groups: np.ndarray) -> np.ndarray:
        """Rows that may be near one of `size` shingles, those with most rare shingles in common first.

        Beyond its rarest, a row has ceil(t n) - 1 shingles; what more is to be shared must be among the rarest.
        """
        starts, stops = self.start[groups], self.start[groups] + self.filled[groups]
        parts = [self.rows[a:b] for a, b in zip(starts.tolist(), stops.tolist())]
        others, shared = np.unique(np.concatenate(parts), return_counts=True)
        others = others.astype(np.int64)
        sizes = self.sets.sizes(others)
        overlap = np.ceil(self.near / (1 + self.near) * (sizes + size) - CAREFUL)
        fits = shared > overlap - _least(self.near, np.maximum(sizes, size))
        fits &= np.minimum(sizes, size) >= self.near * np.maximum(sizes, size) - CAREFUL
        return others[fits][np.argsort(-shared[fits], kind="stable")]


def _suspects(sets: Sets, distinct: np.ndarray, near: float | None) -> Iterator[tuple[int, np.ndarray, _Index]]:
    """The rows, ascending, that may be near another; the rare shingles that others have too; an index of those."""
    if near is None:
        return
    counts = _Counts(int(sets.sizes(distinct).sum()))
    for block in sets.blocks(distinct):
        counts.add(sets.gather(block)[0])
    tokens, owner = _prefixes(sets, distinct, counts, near, 2)
    _, group, many = np.unique(tokens, return_inverse=True, return_counts=True)
    del tokens, counts
    shared = many[group] > 1
    group = (np.cumsum(many > 1) - 1)[group[shared]]
    owner = owner[shared]
    index = _Index(sets, near, many[many > 1])
    for row, groups in _by_row(owner, group):
        yield row, groups, index


def _by_row(owner: np.ndarray, group: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row with its groups; `owner` is ascending."""
    edges = np.flatnonzero(np.diff(owner.astype(np.int64), prepend=-1)).tolist()
    for start, stop in zip(edges, [*edges[1:], len(owner)]):
        yield int(owner[start]), group[start:stop]
