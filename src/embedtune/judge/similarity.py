"""Similarity: how well the cosines of sentence pairs follow the scores that people gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedtune.data.pairs import ScoredPair
from embedtune.errors import UserError, short_list
from embedtune.judge.report import Report
from embedtune.judge.retrieval import check_dims

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder


def judge_similarity(
    encoder: Encoder, pairs: Iterable[ScoredPair], name: str, *, dims: Sequence[int | None] = (None,)
) -> list[Report]:
    """Embed each distinct sentence once, and report Spearman and Pearson at each of `dims`, None being all numbers.

    Raises one UserError for all pairs whose score is no finite number, and where the scores are all the same.
    """
    rows = list(pairs)
    gold = _gold(rows, name)
    check_dims(dims, encoder.dimension, encoder.name)
    number: dict[str, int] = {}
    for row in rows:
        for text in (row.sentence1, row.sentence2):
            number.setdefault(text, len(number))
    vectors = encoder.encode(list(number), "text")
    one, two = (vectors[[number[text] for text in side]] for side in zip(*((r.sentence1, r.sentence2) for r in rows)))
    items = tuple(f"{Path(row.file).name}:{row.number}" for row in rows)
    return [_report(encoder.name, name, items, gold, one[:, :dim], two[:, :dim]) for dim in dims]


def _report(
    model: str, data: str, items: tuple[str, ...], gold: np.ndarray, one: np.ndarray, two: np.ndarray
) -> Report:
    predicted = cosines(one, two)
    summary = {name: float(statistic(gold, predicted)[0]) for name, statistic in CORRELATIONS.items()}
    return Report("similarity", data, model, one.shape[1], items, summary, gold=gold, predicted=predicted)


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosine of each row of `one` (n, D) with the same row of `two`: (n,) float64; 0 where a row is zero.

    Equal rows have exactly 1, so that pairs of identical texts are ties and not 1 plus or minus the last bit.
    """
    one, two = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    found = np.einsum("nd,nd->n", one, two) / np.where(lengths > 0, lengths, 1)
    return np.where((one == two).all(1) & (lengths > 0), 1.0, found)


def pearson(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation of (n,) with (n,) for each row of `weights` (B, n), how often an item was drawn: (B,).

    Without weights every item counts once. Where one side is constant the correlation is taken as 0: it predicts
    nothing.
    """
    weights = np.ones((1, len(gold))) if weights is None else weights
    return _correlation(gold[None], predicted[None], weights)


def spearman(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation, as `pearson` of the ranks within each resample; equals share their mean rank."""
    weights = np.ones((1, len(gold))) if weights is None else weights
    return _correlation(_ranks(gold, weights), _ranks(predicted, weights), weights)


CORRELATIONS: dict[str, Callable[..., np.ndarray]] = {"spearman": spearman, "pearson": pearson}


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean rank of each item where item i stands weights[b, i] times: (B, n)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    total = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights[:, order], axis=1)], axis=1)
    below, upto = (total[:, np.searchsorted(ordered, values, side)] for side in ("left", "right"))
    return (below + upto + 1) / 2


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(1, keepdims=True)
    # What rounding leaves of a constant is no spread.
    floors = [total[:, 0] * (1e-12 * np.abs(side).max()) ** 2 for side in (x, y)]
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    xx, yy, xy = ((weights * left * right).sum(1) for left, right in ((x, x), (y, y), (x, y)))
    varies = (xx > floors[0]) & (yy > floors[1])
    return np.where(varies, xy / np.sqrt(np.where(varies, xx * yy, 1)), 0).clip(-1, 1)


def _gold(rows: Sequence[ScoredPair], name: str) -> np.ndarray:
    """The scores (n,) float64, after a check of all of them."""
    if len(rows) < 3:
        raise UserError(f"has {len(rows)} scored pairs; a correlation needs at least 3", where=name)
    bad = [row for row in rows if not _is_number(row.score)]
    if bad:
        shown = short_list([f"{Path(row.file).name}, row {row.number:,} ({row.score!r})" for row in bad])
        what = f"the score is no finite number in {len(bad):,} of {len(rows):,} pairs"
        fix = "give every pair a number; --columns score=NAME says in which column it stands"
        raise UserError(what, where=name, details=[shown], fix=fix)
    gold = np.array([row.score for row in rows], np.float64)
    if (gold == gold[0]).all():
        raise UserError(f"all scores are {gold[0]:g}: nothing can correlate with them", where=name)
    return gold


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
