"""Which rows are held out: whole documents (or runs of neighbouring lines), never rows that training also has.

Neighbouring lines of a document give each other away, so the split never falls between them; and a held-out row
whose text stands in a training row as well is moved to the training side, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune import keyed
from embedtune.data.spool import Spool
from embedtune.data.tokens import Tokens
from embedtune.errors import UserError

RUN = 64  # lines of one document that stay together
SHINGLE = 5  # tokens
SAME = 0.8  # share of a row's shingles found in one training row that makes it a near-duplicate
COMMON = 64  # shingles in more held-out rows than this are boilerplate and prove nothing
ROWS = 4096  # training rows compared at once


@dataclass(frozen=True)
class AllBut:
    """The row numbers below `size` that are not among `left_out` (ascending): as an array of them, but not stored."""

    size: int
    left_out: np.ndarray

    def __len__(self) -> int:
        return self.size - len(self.left_out)

    def __iter__(self) -> Iterator[int]:
        return iter(self.whole().tolist())  # without this, Python would count up places for ever

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return places + np.searchsorted(self.left_out - np.arange(len(self.left_out)), places, side="right")

    def whole(self) -> np.ndarray:
        """The numbers as an array, (n,) int64."""
        return self[np.arange(len(self))]


@dataclass(frozen=True)
class Split:
    """Row numbers of the two sides, and how many held-out rows were moved because training has their text."""

    train: AllBut
    dev: np.ndarray
    moved: int


def hold_out(tokens: Tokens, rows: int, seed: int) -> Split:
    """Hold out about `rows` rows, at most a tenth. Raises UserError where none can be held out."""
    drawn = _drawn(tokens.all_places(), _wanted(len(tokens), rows), seed)
    found = also_in(tokens, AllBut(len(tokens), drawn), drawn)
    held = np.setdiff1d(drawn, found)
    _need_some(len(held) > 0)
    return Split(AllBut(len(tokens), held), held, len(found))


def hold_out_lines(lines: Spool, rows: int, seed: int) -> dict[str, Any]:
    """`hold_out` of lines that are not tokenised: only those whose very text training also has are moved.

    Line numbers `held`, ascending, and how many were `moved`. Memory is bounded by the held-out lines.
    """
    drawn = _drawn(lines.all_places(), _wanted(len(lines), rows), seed)
    texts, numbers = lines.texts(drawn), set(drawn.tolist())
    known = {text for number, text in lines.having(set(texts)) if number not in numbers}
    held = [number for number, text in zip(drawn.tolist(), texts) if text not in known]
    _need_some(bool(held))
    return {"held": held, "moved": len(drawn) - len(held)}


def _wanted(count: int, rows: int) -> int:
    wanted = min(rows, count // 10)
    if wanted == 0:
        raise UserError(
            f"{count} row(s) of text: too few to hold any out for scoring",
            fix="give at least 10 lines, or a file of its own to score on with --dev FILE",
        )
    return wanted


def _need_some(some: bool) -> None:
    if not some:
        raise UserError(
            "every row that could be held out for scoring also stands in the training text",
            fix="remove the duplicates, or give a file of its own to score on with --dev FILE",
        )


def _drawn(places: Iterable[np.ndarray], wanted: int, seed: int) -> np.ndarray:
    """Rows of the groups with the smallest keys that have `wanted` rows together, ascending.

    `places` are (n, 2) documents and lines in them, block by block and in reading order, so a group ends where the
    document or the run of lines changes. Only the best so far are kept.
    """
    run = max(1, min(RUN, wanted // 8))
    rows, keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    seen, group, last = 0, -1, np.array([[-1, -1]])
    for block in places:
        here = np.stack([block[:, 0], block[:, 1] // run], axis=1)
        groups = group + np.cumsum((np.diff(here, axis=0, prepend=last) != 0).any(axis=1))
        rows = np.concatenate([rows, seen + np.arange(len(block))])
        keys = np.concatenate([keys, keyed.key(seed, groups)])
        if len(keys) > wanted:
            best = keys <= np.partition(keys, wanted - 1)[wanted - 1]  # no two groups share a key
            rows, keys = rows[best], keys[best]
        seen, group, last = seen + len(block), groups[-1], here[-1:]
    return rows


def also_in(
    tokens: Tokens, train: np.ndarray | AllBut, dev: np.ndarray, dev_tokens: Tokens | None = None
) -> np.ndarray:
    """The rows of `dev` ((n,) row numbers) whose text, nearly or exactly, stands in one row of `train`.

    Near means: at least 80 % of the row's shingles of five tokens. Exact, no sketching; memory is bounded by the
    held-out rows and one block of training rows.
    """
    hashes, owners = _distinct(*next(_shingles(dev_tokens or tokens, dev, len(dev))))
    _, inverse, many = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = (many <= COMMON)[inverse]
    leaked = _repeated(tokens, train, dev, dev_tokens or tokens)
    if not rare.any():
        return dev[leaked]
    hashes, owners = hashes[rare], owners[rare]
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    total = np.bincount(owners, minlength=len(dev))
    for block, rows in _shingles(tokens, train, ROWS):
        known = hashes[np.minimum(np.searchsorted(hashes, block), len(hashes) - 1)] == block
        block, rows = _distinct(block[known], rows[known])
        first, last = np.searchsorted(hashes, block, "left"), np.searchsorted(hashes, block, "right")
        count = last - first
        pairs = np.repeat(rows, count) * len(dev)
        reach = np.repeat(first, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pair, shared = np.unique(pairs + owners[reach], return_counts=True)
        hit = pair % len(dev)
        leaked[hit[shared >= SAME * total[hit]]] = True
    return dev[leaked]


def _repeated(tokens: Tokens, train: np.ndarray | AllBut, dev: np.ndarray, dev_tokens: Tokens) -> np.ndarray:
    """(len(dev),) bool: rows that stand in `train` token for token, however common they are."""
    wanted = np.concatenate(list(_row_hashes(dev_tokens, dev)))
    leaked = np.zeros(len(dev), bool)
    for hashes in _row_hashes(tokens, train):
        leaked |= np.isin(wanted, hashes)
    return leaked


def _blocks(rows: np.ndarray | AllBut, size: int) -> Iterator[np.ndarray]:
    """Row numbers in runs of `size`."""
    for at in range(0, len(rows), size):
        yield rows[np.arange(at, min(at + size, len(rows)))]


def _row_hashes(tokens: Tokens, rows: np.ndarray | AllBut) -> Iterator[np.ndarray]:
    """A hash of each row's tokens and their places, block by block."""
    for block in _blocks(rows, ROWS):
        ids, _, offset, length = _flat(tokens, block)
        yield keyed.key(np.add.reduceat(keyed.key(ids, offset), np.cumsum(length) - length), length)


def _flat(tokens: Tokens, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rows of `block` end to end: ids, and per token its row's place in the block and its own place in the row;
    per row its length."""
    tokens.let_go()
    length = tokens.lengths_of(block)
    owner = np.repeat(np.arange(len(block)), length)
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    if (np.diff(block) == 1).all():  # most blocks: rows that follow each other lie in one piece
        end = int(tokens.ends[block[-1]])
        ids = tokens.ids[end - len(owner) : end]
    else:
        ids = np.concatenate([tokens.row(number) for number in block])
    return ids.astype(np.int64), owner, offset, length


def _shingles(tokens: Tokens, rows: np.ndarray | AllBut, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each block of `size` rows: their shingle hashes, and each one's row as its place in the block."""
    for block in _blocks(rows, size):
        ids, owner, offset, length = _flat(tokens, block)
        # Zero stands for "past the end of the row", so ids count from one here.
        padded = np.concatenate([ids + 1, np.zeros(SHINGLE, np.int64)])
        parts = [
            np.where(offset + ahead < length[owner], padded[ahead : len(ids) + ahead], 0) for ahead in range(SHINGLE)
        ]
        starts = offset < np.maximum(1, length[owner] - SHINGLE + 1)
        yield keyed.key(*(part[starts] for part in parts)), owner[starts]


def _distinct(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every (hash, owner) once."""
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[new], owners[new]
