"""Texts that nearly repeat each other, found exactly and in bounded memory.

Two texts are near when the Jaccard overlap of their 3-word shingles is at least a threshold t. Then they share at
least t of either's shingles, so that one of those shared is among the n - ceil(t n) + 1 rarest of each (prefix
filtering: Bayardo, Ma, Srikant, WWW 2007). Only rows that have enough such rare shingles in common are compared, and
those exactly. So no pair is missed by chance, as it would be with MinHash. The one limit is CROWD, which is reached
by form letters only.

What is known of the rows lies in files without a name, as the shingles do (see `shingles`), and what must be sorted is
parted by its hash first. So beside a table of at most 32 MiB there stand in memory some blocks and parts, whose size
does not depend on how many rows there are, and where the parts begin (under a MB for ten million rows; see `Parted`).
`components` and `repeated` hold what they give, too, and `repeated` some numbers for each of its own rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from mmap import MADV_DONTNEED

import numpy as np

from embedtune.data.scratch import Column, Numbers, Parted, blocks, parts_for, records, zeros
from embedtune.data.shingles import COLUMNS, SHIFT, Sets

CROWD = 200  # rows that are kept for a rare shingle, unless a row has a rarer one: beyond, it is boilerplate
TABLE_BITS = 25  # the largest table of counts
CAREFUL = 1e-9  # products such as 0.8 * 15 may come out above the whole number that they are
TOUCHED = 256  # places of the index that are looked up before its pages are handed back
KEYED = np.dtype([("key", np.uint64), ("row", np.uint32)])
JOINED = np.dtype([("row", np.uint32), ("first", np.uint32)])  # a row, and the first that equals it
SLOT = np.dtype([("row", np.uint32), ("slot", np.int64)])  # a row, and where the index has one of its shingles


def leaders(sets: Sets, near: float | None) -> np.ndarray:
    """(rows,) uint32: for each row the row that it repeats, exactly or nearly, or itself.

    Rows are taken in order; each is given to the first row that is itself not given away and is near enough. So
    every row is near the one it is given to, and rows that are not given away are not near each other. Without
    `near` only exact repeats count.
    """
    return np.asarray(leaders_on_disk(sets, near))


def leaders_on_disk(sets: Sets, near: float | None) -> Column:
    """The same in a file without a name: memory does not depend on the number of rows."""
    label, distinct = _exact(sets)
    for row, own, slots, index in _suspects(sets, distinct, near):
        others = np.sort(index.candidates(len(own), slots))
        found = others[_near(own, *sets.gather(others), index.near)]
        if len(found):
            label[row] = found[0]
        else:
            index.insert(row, len(own), slots)
    final = Column(np.uint32, sets.folder)
    for first, block in blocks(label):
        away = np.flatnonzero(block != np.arange(first, first + len(block)))
        block = block.copy()
        block[away] = label.take(block[away])
        final.append(block)
    return final


def components(sets: Sets, near: float | None) -> np.ndarray:
    """(rows,) int64: the first row of each row's component, where rows that repeat each other are joined.

    Rows of different components are not near each other.
    """
    label, distinct = _exact(sets)
    parent = array("I", range(len(sets)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, own, slots, index in _suspects(sets, distinct, near):
        others = index.candidates(len(own), slots)
        # A few first: where all are alike, they bring the row into the component of all the others.
        for some in (others[:1], others[1:9], others[9:]):
            mine = root(row)
            some = np.array([other for other in some.tolist() if root(other) != mine], np.int64)
            for other in some[_near(own, *sets.gather(some), index.near)].tolist():
                a, b = sorted((root(row), root(other)))
                parent[b] = a
        index.insert(row, len(own), slots)
    return np.fromiter(map(root, range(len(sets))), np.int64, len(sets))[np.asarray(label)]


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
    label, distinct = map(np.asarray, _exact(rows))
    own = np.asarray(rows.exact)
    exact, close, where = np.zeros(len(rows), bool), np.zeros(len(rows), bool), np.zeros(len(rows), np.int64)
    order = distinct[np.argsort(own[distinct])]
    keys = own[order]
    find = _finder(rows, distinct, near) if near is not None else None
    seen = 0
    for block in others if len(rows) else ():
        for number, found in find(block, close) if find else ():
            where[found], close[found] = seen + number, True
        theirs = np.asarray(block.exact)
        place = np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)
        fresh = (keys[place] == theirs) & ~exact[order[place]]
        numbers = np.flatnonzero(fresh)[::-1]  # so that of several the first is written last
        hits = order[place[numbers]]
        where[hits], exact[hits] = seen + numbers, True
        seen += len(block)
    return Repeats(exact[label], (close & ~exact)[label], where[label])


def _finder(
    rows: Sets, distinct: np.ndarray, near: float
) -> Callable[[Sets, np.ndarray], Iterator[tuple[int, np.ndarray]]]:
    """A function of a block and of the rows already found: the numbers in the block, and the rows near them."""
    counts = _counted(rows, distinct)
    prefixes = list(_prefixes(rows, distinct, counts, near, 1))
    tokens, group, many = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(tokens for tokens, _ in prefixes)]),
        return_inverse=True,
        return_counts=True,
    )
    index = _Index(rows, near, int(many.sum()) + len(many))
    owners = np.concatenate([np.zeros(0, np.uint32), *(owner for _, owner in prefixes)])
    starts = index.fill(owners, rows.sizes(owners), group, many)

    def find(block: Sets, done: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        everything = np.arange(len(block))
        flat, owner = block.gather(everything)
        known = np.bincount(owner[counts[flat] > 0], minlength=len(block))
        likely = np.flatnonzero(known >= _least(near, block.sizes(everything)))
        for wanted, numbers in _prefixes(block, likely, counts, near, 1):
            place = np.minimum(np.searchsorted(tokens, wanted), len(tokens) - 1)
            there = tokens[place] == wanted
            for number, slots in _by_row(numbers[there], starts[place[there]]):
                own = block.row(number)
                others = index.candidates(len(own), slots)
                others = others[~done[others]]
                yield number, others[_near(own, *rows.gather(others), near)]

    return find


def _exact(sets: Sets) -> tuple[Column, Column]:
    """For each row the first that equals it; and the rows that equal no earlier one. Both uint32."""
    parts = parts_for(len(sets))
    by_hash = Parted(KEYED, parts, sets.folder)
    for start, hashes in blocks(sets.exact):
        rows = np.arange(start, start + len(hashes))
        by_hash.add(records(KEYED, key=hashes, row=rows), hashes % np.uint64(parts))
    by_row, span = Parted(JOINED, parts, sets.folder), -(-len(sets) // parts)
    for number in range(parts):
        known = np.zeros(0, KEYED)
        for block in by_hash.part(number):
            block = np.concatenate([known, block])  # what is known comes first, and so do the rows that it names
            _, first, inverse = np.unique(block["key"], return_index=True, return_inverse=True)
            again = np.flatnonzero(first[inverse] != np.arange(len(block)))
            known, firsts = block[first], block["row"][first[inverse[again]]]
            by_row.add(records(JOINED, row=block["row"][again], first=firsts), block["row"][again] // max(1, span))
    label, distinct = Column(np.uint32, sets.folder), Column(np.uint32, sets.folder)
    for number in range(parts):
        rows = np.arange(number * span, min(len(sets), (number + 1) * span), dtype=np.uint32)
        first = rows.copy()
        for block in by_row.part(number):
            first[block["row"] - np.uint32(number * span)] = block["first"]
        label.append(first)
        distinct.append(rows[first == rows])
    return label, distinct


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


def _counted(sets: Sets, rows: Numbers) -> _Counts:
    """The counts of the rows' shingles."""
    counts = _Counts(sum(int(sets.sizes(some).sum()) for _, some in blocks(rows)))
    for block in sets.blocks(rows):
        counts.add(sets.gather(block)[0])
    return counts


def _prefixes(
    sets: Sets, rows: Numbers, counts: _Counts, near: float, least: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rarest shingles of the rows that stand in `least` rows or seem to, and the row of each, by blocks of rows."""
    for block in sets.blocks(rows):
        flat, owner = sets.gather(block)
        chosen = _rarest(counts, sets.sizes(block), flat, owner, near)
        chosen = chosen[counts[flat[chosen]] >= least]
        yield flat[chosen], block[owner[chosen]].astype(np.uint32)


class _Index:
    """For each rare shingle the rows that have it, as far as they were inserted.

    It is a file of `size` int64: at the slot of a shingle stands how many rows it has, and behind that each of these
    with its size, row << 32 | size. In memory stand the pages of the last TOUCHED shingles looked up.
    """

    def __init__(self, sets: Sets, near: float, size: int) -> None:
        self.near = near
        self.map = zeros(np.int64, max(1, size), sets.folder).mapped()
        self.rows = np.frombuffer(self.map, np.int64)
        self.touched = 0

    def insert(self, row: int, size: int, slots: np.ndarray) -> None:
        """Let a row of `size` shingles be found by those at `slots`."""
        filled = self.rows[slots]
        if filled.min() < CROWD:
            free = filled < 4 * CROWD
            self.rows[slots[free] + 1 + filled[free]] = row << 32 | size
            self.rows[slots[free]] += 1

    def candidates(self, size: int, slots: np.ndarray) -> np.ndarray:
        """Rows that may be near one of `size` shingles, those with most rare shingles in common first.

        Beyond its rarest, a row has ceil(t n) - 1 shingles; what more is to be shared must be among the rarest.
        """
        self.touched += len(slots)
        if self.touched > TOUCHED:
            self.map.madvise(MADV_DONTNEED)
            self.touched = 0
        stops = slots + 1 + self.rows[slots]
        parts = [self.rows[a:b] for a, b in zip((slots + 1).tolist(), stops.tolist())]
        others, shared = np.unique(np.concatenate(parts), return_counts=True)
        others, sizes = others >> 32, others & (2**32 - 1)
        overlap = np.ceil(self.near / (1 + self.near) * (sizes + size) - CAREFUL)
        fits = shared > overlap - _least(self.near, np.maximum(sizes, size))
        fits &= np.minimum(sizes, size) >= self.near * np.maximum(sizes, size) - CAREFUL
        return others[fits][np.argsort(-shared[fits], kind="stable")]

    def fill(self, rows: np.ndarray, sizes: np.ndarray, groups: np.ndarray, many: np.ndarray) -> np.ndarray:
        """Insert rows without a limit, `many` in each of the groups; gives the slots of these."""
        slots = np.cumsum(many + 1) - many - 1
        self.rows[slots] = many
        order = np.argsort(groups, kind="stable")
        self.rows[np.arange(len(order)) + groups[order] + 1] = (rows.astype(np.int64) << 32 | sizes)[order]
        return slots


def _tokens(sets: Sets, distinct: Numbers, near: float) -> tuple[Parted, np.ndarray]:
    """Rare shingles that seem to stand in two rows, parted by hash; and rows that cut these into runs as long."""
    counts = _counted(sets, distinct)
    most = 0
    for _, some in blocks(distinct):
        sizes = sets.sizes(some)
        most += int((sizes - _least(near, sizes) + 1).sum())
    by_hash, starts, many = Parted(KEYED, parts_for(most), sets.folder), [0], 0
    for tokens, owner in _prefixes(sets, distinct, counts, near, 2):
        by_hash.add(records(KEYED, key=tokens, row=owner), tokens % np.uint64(by_hash.parts))
        many += len(tokens)
        if many >= most // by_hash.parts:
            starts.append(int(owner[-1]) + 1)
            many = 0
    return by_hash, np.array(starts)


def _slots(sets: Sets, distinct: Numbers, near: float) -> tuple[Parted, int]:
    """For each row where the index has those of its rare shingles that others have too; and the index's size."""
    by_hash, starts = _tokens(sets, distinct, near)
    by_row, size = Parted(SLOT, len(starts), sets.folder), 0
    for number in range(by_hash.parts):
        known, many = np.zeros(0, KEYED), np.zeros(0, np.int64)
        for block in by_hash.part(number):
            many = np.concatenate([many, np.ones(len(block), np.int64)])
            block = np.concatenate([known, block])
            _, first, inverse = np.unique(block["key"], return_index=True, return_inverse=True)
            known, many = block[first], np.bincount(inverse, many).astype(np.int64)
        keys, rows, room = known["key"][many > 1], known["row"][many > 1], np.minimum(many[many > 1], 4 * CROWD) + 1
        if not len(keys):
            continue
        order = np.argsort(rows, kind="stable")  # what is near in the data is near in the index
        slots = np.empty(len(keys), np.int64)
        slots[order] = size + np.cumsum(room[order]) - room[order]
        size += int(room.sum())
        for block in by_hash.part(number):
            place = np.minimum(np.searchsorted(keys, block["key"]), len(keys) - 1)
            there = keys[place] == block["key"]
            found = records(SLOT, row=block["row"][there], slot=slots[place[there]])
            by_row.add(found, np.searchsorted(starts, found["row"], "right") - 1)
    return by_row, size


def _suspects(
    sets: Sets, distinct: Numbers, near: float | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray, _Index]]:
    """The rows, ascending, that may be near another: number, shingles, slots in an index; and that index."""
    if near is None:
        return
    by_row, size = _slots(sets, distinct, near)
    index = _Index(sets, near, size)
    for number in range(by_row.parts):
        found = np.concatenate([np.zeros(0, SLOT), *by_row.part(number)])
        found = found[np.argsort(found["row"], kind="stable")]
        rows = np.unique(found["row"])
        each = _by_row(found["row"], found["slot"])
        for block in sets.blocks(rows):
            flat, owner = sets.gather(block)
            stops = np.searchsorted(owner, np.arange(len(block)), "right").tolist()
            for start, stop, (row, slots) in zip([0, *stops], stops, each):
                yield row, flat[start:stop], slots, index


def _by_row(owner: np.ndarray, group: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row with its groups; `owner` is ascending."""
    edges = np.flatnonzero(np.diff(owner.astype(np.int64), prepend=-1)).tolist()
    for start, stop in zip(edges, [*edges[1:], len(owner)]):
        yield int(owner[start]), group[start:stop]
