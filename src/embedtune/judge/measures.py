"""Retrieval measures as values that print and parse: nDCG@10, MRR@10, recall@100, precision@5, MAP, accuracy@1.

Every measure is a function of where the judged documents stand, and of nothing else; the values are those of
trec_eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from embedtune.errors import UserError, did_you_mean

NAMES = ("nDCG", "MRR", "recall", "precision", "MAP", "accuracy")
# What others call them.
ALIASES = {"rr": "MRR", "ap": "MAP", "r": "recall", "p": "precision", "success": "accuracy", "hit": "accuracy"}
NEED_CUTOFF = ("recall", "precision", "accuracy")
NOT_FOUND = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Judged:
    """Where the judged documents of `queries` queries stand, one entry per judgement, in any order.

    `query` (J,): which query, from 0. `gain` (J,): its relevance; 0 and less is not relevant. `rank` (J,): its place
    in the ranking from 1, or NOT_FOUND where it lies below what was looked at.
    """

    queries: int
    query: np.ndarray
    gain: np.ndarray
    rank: np.ndarray

    def relevant(self) -> Judged:
        """Only the judgements above zero."""
        kept = self.gain > 0
        return Judged(self.queries, self.query[kept], self.gain[kept], self.rank[kept])

    def sorted(self, key: np.ndarray) -> tuple[Judged, np.ndarray]:
        """By query and then `key` (J,), with the place (from 1) of each entry among its query's."""
        order = np.lexsort((key, self.query))
        query = self.query[order]
        place = np.arange(len(query)) - np.searchsorted(query, query) + 1
        return Judged(self.queries, query, self.gain[order], self.rank[order]), place

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values` (J,) for each query: (Q,)."""
        return np.bincount(self.query, weights=values, minlength=self.queries)


@dataclass(frozen=True, slots=True)
class Measure:
    """One of NAMES and the number of documents it looks at; None looks at the whole ranking."""

    name: str
    cutoff: int | None = None

    def __str__(self) -> str:
        return self.name if self.cutoff is None else f"{self.name}@{self.cutoff}"

    def values(self, judged: Judged) -> np.ndarray:
        """The measure for each query: (Q,) float64, equal to trec_eval's.

        As there, a query without a relevant document scores 0 and counts in the mean, unjudged documents are not
        relevant, nDCG takes the relevance itself as gain over log2(1 + rank), MAP divides by the number of relevant
        documents even where that is above the cutoff, and precision divides by the cutoff even where the corpus is
        smaller. accuracy is trec_eval's success: whether any relevant document was found.
        """
        judged = judged.relevant()
        seen = _seen(judged.rank, self.cutoff)
        relevant = np.maximum(np.bincount(judged.query, minlength=judged.queries), 1)
        match self.name:
            case "nDCG":
                return _ndcg(judged, self.cutoff)
            case "MRR":
                best = np.full(judged.queries, np.inf)
                np.minimum.at(best, judged.query[seen], judged.rank[seen])
                return 1 / best
            case "recall":
                return judged.total(seen) / relevant
            case "precision":
                return judged.total(seen) / (self.cutoff or 1)
            case "MAP":
                ordered, place = judged.sorted(judged.rank)
                seen = _seen(ordered.rank, self.cutoff)
                return ordered.total(np.where(seen, place / ordered.rank, 0)) / relevant
            case "accuracy":
                return np.minimum(judged.total(seen), 1)
        raise ValueError(self.name)


def parse(text: str) -> Measure:
    """'ndcg@10' as a Measure, whatever its case. Raises UserError for one that is unknown or lacks its number."""
    name, _, cutoff = text.strip().partition("@")
    lower = {known.lower(): known for known in NAMES} | ALIASES
    found = lower.get(name.strip().lower())
    if found is None:
        near = did_you_mean(name.strip().lower(), list(lower))
        fix = f"use one of {', '.join(name + '@K' for name in NAMES)}; nDCG, MRR and MAP also without @K"
        raise UserError(f"no measure is called {text!r}{near}", where="--measures", fix=fix)
    if cutoff == "" and "@" not in text and found not in NEED_CUTOFF:
        return Measure(found)
    if not re.fullmatch(r"[0-9]{1,9}", cutoff.strip()) or int(cutoff) == 0:
        what = f"{text!r} needs a whole number of documents after the @"
        raise UserError(what, where="--measures", fix=f"for example {found}@10")
    return Measure(found, int(cutoff))


def parse_all(texts: Iterable[str | Measure]) -> list[Measure]:
    """Every measure once, in the order given; a comma parts several in one text."""
    parts = [part for text in texts for part in ([text] if isinstance(text, Measure) else text.split(","))]
    return list(dict.fromkeys(part if isinstance(part, Measure) else parse(part) for part in parts))


def depth(measures: Sequence[Measure]) -> int | None:
    """How many documents the measures look at; None for all."""
    cutoffs = [measure.cutoff for measure in measures]
    return None if None in cutoffs else max((cutoff for cutoff in cutoffs if cutoff), default=0)


def _ndcg(judged: Judged, cutoff: int | None) -> np.ndarray:
    ideal, place = judged.sorted(-judged.gain)
    best = ideal.total(_discounted(ideal.gain, place, cutoff))
    got = judged.total(_discounted(judged.gain, judged.rank, cutoff))
    return np.divide(got, best, out=np.zeros(judged.queries), where=best > 0)


def _discounted(gain: np.ndarray, rank: np.ndarray, cutoff: int | None) -> np.ndarray:
    return np.where(_seen(rank, cutoff), gain / np.log2(1 + rank.astype(np.float64)), 0)


def _seen(rank: np.ndarray, cutoff: int | None) -> np.ndarray:
    return rank < NOT_FOUND if cutoff is None else rank <= cutoff
