"""Association tests (WEAT, doi 10.1126/science.aal4230): are words of X nearer to attribute A than those of Y?

A word's vector is the mean of its unit vectors in a few plain sentences, so each word counts once. SEAT (arXiv
1903.10561) takes each sentence as an item of its own: the sentences of a word are not independent, and p gets too
small. The word lists are those of the paper, the sentences are ours; both stand in association.toml.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune.errors import UserError, short_list
from embedtune.judge.score import DRAWS, Score, percentiles
from embedtune.nearest import unit

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

EXACT_WORDS = 40  # of both groups, up to which every division is counted: 2^20 sums for each half
PERMUTATIONS = 100_000
BLOCK = 1 << 22  # numbers held at once while drawing
TIE = 1e-12  # of the sum of sizes: sums nearer than this are equal


@dataclass(frozen=True)
class AssociationTest:
    """Target words X and Y, attribute words A and B."""

    name: str
    about: str
    targets: tuple[tuple[str, ...], tuple[str, ...]]
    attributes: tuple[tuple[str, ...], tuple[str, ...]]

    def __post_init__(self) -> None:
        """Raises UserError for a list with fewer than two words or a word twice, and for lists that overlap."""
        for one, two in (self.targets, self.attributes):
            if least := [side for side in (one, two) if len(side) < 2]:
                raise UserError(f"a list has {len(least[0])} words; it needs at least two", where=self.name)
            words = [*one, *two]
            if twice := sorted({word for word in words if words.count(word) > 1}):
                raise UserError(f"stands more than once in its lists: {short_list(twice)}", where=self.name)


@cache
def lists() -> Mapping[str, Any]:
    """Word lists, tests and sentences, as they stand in association.toml."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def tests() -> dict[str, AssociationTest]:
    """The tests that come with the package, by name."""
    sets = {name: tuple(words.split()) for name, words in lists()["words"].items()}
    return {
        name: AssociationTest(
            name, test["about"], (sets[test["X"]], sets[test["Y"]]), (sets[test["A"]], sets[test["B"]])
        )
        for name, test in lists()["tests"].items()
    }


def judge_association(
    encoder: Encoder, chosen: Sequence[AssociationTest] | None = None, *, seed: int = 0
) -> list[Score]:
    """The effect sizes of some tests (all that come with the package), each word embedded once in each sentence."""
    wanted = list(tests().values() if chosen is None else chosen)
    words = list(dict.fromkeys(w for test in wanted for side in (*test.targets, *test.attributes) for w in side))
    vectors = dict(zip(words, word_vectors(encoder, words)))
    return [
        association(
            f"{test.name}: {test.about}",
            *[np.stack([vectors[w] for w in side]) for side in (*test.targets, *test.attributes)],
            seed=seed,
        )
        for test in wanted
    ]


def word_vectors(encoder: Encoder, words: Sequence[str]) -> np.ndarray:
    """The mean unit vector (n, D) of each word over its sentences: those for names, or those for any other word."""
    names = {word for name, listed in lists()["words"].items() if "names" in name for word in listed.split()}
    kinds = [lists()["sentences"]["names" if word in names else "words"] for word in words]
    texts = [sentence.format(word) for word, kind in zip(words, kinds) for sentence in kind]
    vectors = unit(encoder.encode(texts).astype(np.float64))
    return np.stack([part.mean(0) for part in np.split(vectors, np.cumsum([len(kind) for kind in kinds])[:-1])])


def association(
    name: str, x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, *, ddof: int = 1, seed: int = 0
) -> Score:
    """WEAT's effect size d of vectors X (m, D), Y (n, D) against attributes A and B, with its one-sided p.

    s(w) = mean cosine to A minus mean cosine to B; d = (mean s(X) - mean s(Y)) / sd of s over X and Y. `ddof` 1 is
    the paper's standard deviation, 0 that of WEFE. Interval and p take the attribute words as given: the interval
    resamples the words of X and of Y (in simulations of 8 and 16 words each it held the truth in 89 to 95 %), p is of
    the hypothesis that the targets were dealt to X and Y at random. Raises UserError for lists of fewer than two words.
    """
    sides = [unit(np.asarray(side, np.float64)) for side in (x, y, a, b)]
    if min(len(side) for side in sides) < 2:
        raise UserError("a list has fewer than two words", where=name)
    s = np.concatenate(sides[:2]) @ (sides[2].mean(0) - sides[3].mean(0))
    sizes = len(x), len(y)
    value = float(_effects(s, [np.ones((1, size)) for size in sizes], ddof)[0])
    generator = np.random.default_rng(seed)
    times = [generator.multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(np.float64) for size in sizes]
    drawn = _effects(s, times, ddof)
    p, error = permutation_p(s[: sizes[0]], s[sizes[0] :], seed=seed)
    return Score(name, value, *percentiles(drawn, min(sizes)), 0.0, sum(sizes), min(sizes), drawn, p, error)


def permutation_p(x: np.ndarray, y: np.ndarray, *, draws: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float]:
    """One-sided p that values dealt at random give X (m,) a sum as large as it has, and p's standard error.

    Exact, with an error of 0, up to 40 values: every one of the C(m + n, m) divisions is counted, equal sums too. The
    values are parted in two halves; the sums of j values of one half and m - j of the other are counted by sorting,
    so that 2^20 numbers are enough for 10^11 divisions. Above that `draws` random divisions b of which reach the sum
    give (b + 1) / (draws + 1).
    """
    values, m = np.concatenate([x, y]).astype(np.float64), len(x)
    values = values - values.mean()
    least = values[:m].sum() - TIE * max(np.abs(values).sum(), np.finfo(np.float64).tiny)
    if len(values) <= EXACT_WORDS:
        half = len(values) // 2
        one, two = _sums_by_size(values[:half]), _sums_by_size(values[half:])
        hits = 0
        for size, sums in enumerate(one):
            if 0 <= m - size < len(two):
                others = np.sort(two[m - size])
                hits += int((len(others) - np.searchsorted(others, least - sums, "left")).sum())
        return hits / math.comb(len(values), m), 0.0
    generator = np.random.default_rng(seed)
    hits, step = 0, max(1, BLOCK // len(values))
    for first in range(0, draws, step):
        keys = generator.random((min(step, draws - first), len(values)))
        hits += int((values[np.argpartition(keys, m, axis=1)[:, :m]].sum(1) >= least).sum())
    p = (hits + 1) / (draws + 1)
    return p, math.sqrt(p * (1 - p) / (draws + 1))


def _effects(s: np.ndarray, times: Sequence[np.ndarray], ddof: int) -> np.ndarray:
    """d on each resample, (B,), of s (m + n,), from how often each word counts, (B, m) and (B, n); 0 without spread."""
    m, both = times[0].shape[1], np.concatenate(times, axis=1)
    total = both.sum(1)
    apart = times[0] @ s[:m] / times[0].sum(1) - times[1] @ s[m:] / times[1].sum(1)
    spread = np.sqrt(((both * (s - (both @ s / total)[:, None]) ** 2).sum(1)) / (total - ddof))
    return np.divide(apart, spread, out=np.zeros(len(both)), where=spread > TIE)


def _sums_by_size(values: np.ndarray) -> list[np.ndarray]:
    """The sums of all subsets, those of k values at place k."""
    found = [np.zeros(1)]
    for value in values:
        longer = [np.concatenate([same, less + value]) for same, less in zip([*found[1:], np.zeros(0)], found)]
        found = [found[0], *longer]
    return found
