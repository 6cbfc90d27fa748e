"""Rows held out by class, in whole groups: each class has about its share on each side, as far as groups allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedtune import keyed

PART = 8  # what a key is for
KEPT = 2  # rows of each class that stay in the first part: with fewer there is nothing to learn


def take(counts: np.ndarray, groups: np.ndarray, quota: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """(n,) bool: rows of whole `groups` (n,), in keyed order, such that no class passes its `quota` (C,).

    `counts` (n, C): how often each class stands in each row.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    names = np.array(list(members))
    held, left = np.zeros(len(groups), bool), quota.copy()
    for group in names[np.argsort(keyed.key(seed, purpose, names), kind="stable")].tolist():
        wanted = counts[members[group]].sum(0)
        if (wanted <= left).all():
            held[members[group]] = True
            left -= wanted
    return held


def stratified(counts: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """(n,) int64: for each row its part, 0 or one of those with `shares`, which are numbered from 1.

    No part but 0 has more of a class than its share (or one row, where the share is less), and of each class at
    least two stay in part 0: a class of two rows is in no other. `counts` as in `take`.
    """
    total, part = counts.sum(0), np.zeros(len(groups), np.int64)
    spare = np.maximum(total - KEPT, 0)
    for number, share in enumerate(shares, 1):
        quota = np.minimum(np.maximum(1, np.round(total * share)).astype(np.int64), spare)
        free = np.flatnonzero(part == 0)
        held = free[take(counts[free], groups[free], quota, seed, PART + number)]
        part[held] = number
        spare = spare - counts[held].sum(0)
    return part
