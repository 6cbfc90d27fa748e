"""How far new texts lie from old ones, before any label is looked at: their words, their pieces, their length, their
nearest old texts.

A distance alone says nothing, for texts of one source differ too. So old texts are parted in two: some are taken as if
they were new, and both they and the new ones are held against the rest of the old.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from embedtune import keyed, nearest
from embedtune.data.distinct import distinct, texts_at
from embedtune.data.tokens import uncut

MOST_READ = 20_000  # texts of each side that are read at all
MOST = 1000  # texts of each kind whose vectors are compared
FEWEST = 20  # texts of a side without which nothing can be said
DRAWS = 2000
FAR = 0.95  # quantile of the old texts' own distances beyond which a new text is far
SHOWN = 8  # new words that are named
READ, SAMPLE, FRESH = 7, 8, 9  # what a key is for
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, eq=False)
class DataDrift:
    """New texts against old ones; of each pair of figures the second is of old texts, taken as if they were new.

    `new_words`: share of the words (as often as they occur) that none of `held` old texts has; `examples`: the most
    frequent that no old text has.
    `unknown`: share of the tokens that the tokenizer does not know; `pieces`: tokens of a word. `words`: the quartiles
    of words a text; `length_gap`: the largest gap between the two distributions (Kolmogorov-Smirnov, 0 to 1).
    `distance`: mean cosine distance to the nearest of `reference` old texts, `low` to `high` the 95 % interval of the
    difference, `far` the share of new texts that lie beyond 95 % of the old. Without vectors these are None.
    """

    old: str
    new: str
    texts: tuple[int, int]
    held: int
    new_words: tuple[float, float]
    examples: tuple[str, ...]
    unknown: tuple[float, float] | None
    pieces: tuple[float, float] | None
    words: tuple[tuple[float, ...], tuple[float, ...]]
    length_gap: float
    reference: int = 0
    distance: tuple[float, float] | None = None
    low: float | None = None
    high: float | None = None
    far: float | None = None
    distances: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(default=None, repr=False)
    lengths: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        left_out = ("distances", "lengths")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}

    def sentences(self) -> list[str]:
        """What was found, in words."""
        mine, theirs = self.new_words
        named = f", most often {', '.join(self.examples)}" if self.examples else ""
        said = [
            f"{percent(mine)} of the words in {self.new} are in none of {self.held:,} texts of {self.old}{named}; "
            f"of the words in other texts of {self.old}, {percent(theirs)} are"
        ]
        if self.unknown and self.pieces:
            said.append(
                f"a word is {self.pieces[0]:.2f} tokens long ({self.pieces[1]:.2f} in {self.old}), and "
                f"{percent(self.unknown[0], 1)} of the tokens are unknown ({percent(self.unknown[1], 1)})"
            )
        said.append(
            f"half of its texts have {self.words[0][0]:.0f} to {self.words[0][2]:.0f} words "
            f"({self.words[1][0]:.0f} to {self.words[1][2]:.0f}); the largest gap between the distributions of length "
            f"is {percent(self.length_gap)}"
        )
        if self.distance and self.low is not None and self.high is not None and self.far is not None:
            how = "as far from the nearest of {} old texts as"
            if self.low > 0 or self.high < 0:
                how = f"{'farther' if self.low > 0 else 'less far'} from the nearest of {{}} old texts than"
            said.append(
                f"its texts are {how.format(f'{self.reference:,}')} other old texts are: cosine distance "
                f"{self.distance[0]:.3f} against {self.distance[1]:.3f} (difference "
                f"{self.distance[0] - self.distance[1]:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}); "
                f"{percent(self.far)} of them are farther than 95 % of the old ones"
            )
        return said


def percent(share: float, digits: int = 0) -> str:
    """A share as a reader of the report expects it: 31 %."""
    return f"{100 * share:.{digits}f} %"


def data_drift(
    old: tuple[str, Iterable[str]],
    new: tuple[str, Iterable[str]],
    tokenizer: Any = None,
    encode: Callable[[list[str]], np.ndarray] | None = None,
    seed: int = 0,
) -> DataDrift | None:
    """New texts against old ones (each a name and its texts); None where either has fewer than FEWEST distinct texts.

    The texts are iterated twice, so they may be what reads them from the disk.
    `tokenizer` and `encode` are the model's; where they are None, their figures are not made.
    """
    sides = [_drawn(side[1], seed) for side in (old, new)]
    if min(map(len, sides)) < FEWEST:
        return None
    # As if they were new: as many old texts as new ones, half of them at most.
    order = _order(sides[0], seed, FRESH)
    count = min(len(order) // 2, max(FEWEST // 2, len(sides[1])))
    fresh, rest = order[:count], order[count:]
    seen, others = Counter(_words(sides[0])), Counter(_words(rest))
    strange = [word for word in _words(sides[1]) if word not in others]
    again = [word for word in _words(fresh) if word not in others]
    named = Counter(word for word in strange if word not in seen)
    counts = [max(1, sum(1 for _ in _words(side))) for side in (sides[1], fresh)]
    lengths = [np.array([len(text.split()) for text in side]) for side in (sides[1], sides[0])]
    found = DataDrift(
        old[0],
        new[0],
        (len(sides[1]), len(sides[0])),
        len(rest),
        (len(strange) / counts[0], len(again) / counts[1]),
        tuple(word for word, _ in named.most_common(SHOWN)),
        None,
        None,
        (_quartiles(lengths[0]), _quartiles(lengths[1])),
        float(ks_2samp(*lengths).statistic),
        lengths=(lengths[0], lengths[1]),
    )
    if tokenizer is not None:
        tokens = [_tokens(side, tokenizer) for side in (sides[1], sides[0])]
        unknown, pieces = zip(*tokens, strict=True)
        found = dataclasses.replace(found, unknown=unknown, pieces=pieces)
    if encode is None:
        return found
    some = [encode(_order(side, seed, SAMPLE)[:MOST]) for side in (sides[1], fresh, rest)]
    return dataclasses.replace(found, **_distances(some[0], some[1], some[2], seed))


def _distances(new: np.ndarray, fresh: np.ndarray, rest: np.ndarray, seed: int) -> dict[str, Any]:
    """Distances of new (n, D) and of fresh old vectors (m, D) to the nearest of the rest (r, D), and their contrast."""
    mine, theirs = (1 - nearest.top_k(nearest.Unit(v), nearest.Unit(rest), 1)[0][:, 0] for v in (new, fresh))
    generator = np.random.default_rng(seed)
    drawn = [side[generator.integers(0, len(side), (DRAWS, len(side)))].mean(1) for side in (mine, theirs)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return {
        "reference": len(rest), "distance": (float(mine.mean()), float(theirs.mean())), "low": float(low),
        "high": float(high), "far": float((mine > np.quantile(theirs, FAR)).mean()), "distances": (mine, theirs),
    }  # fmt: skip


def _drawn(texts: Iterable[str], seed: int) -> list[str]:
    """The first MOST_READ of the distinct texts in keyed order."""
    numbers = distinct(texts)
    return texts_at(texts, numbers[_places(len(numbers), seed, READ)[:MOST_READ]])


def _order(texts: Sequence[str], seed: int, what: int) -> list[str]:
    """The texts in keyed order."""
    return [texts[n] for n in _places(len(texts), seed, what).tolist()]


def _places(count: int, seed: int, what: int) -> np.ndarray:
    """The numbers below `count` in keyed order: (count,) int64."""
    return np.argsort(keyed.key(seed, what, np.arange(count)), kind="stable")


def _words(texts: Iterable[str]) -> Iterable[str]:
    return (word for text in texts for word in WORD.findall(text.casefold()))


def _quartiles(lengths: np.ndarray) -> tuple[float, ...]:
    return tuple(float(x) for x in np.quantile(lengths, [0.25, 0.5, 0.75]))


def _tokens(texts: Sequence[str], tokenizer: Any) -> tuple[float, float]:
    """The share of tokens that are unknown, and tokens a word."""
    ids = [e.ids for e in uncut(tokenizer).encode_batch(list(texts), add_special_tokens=False)]
    total = sum(map(len, ids))
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids) if tokenizer.unk_token_id is not None else 0
    return unknown / max(1, total), total / max(1, sum(len(text.split()) for text in texts))
