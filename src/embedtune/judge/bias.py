"""All that is measured of a model's bias, and the words that must stand beside the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedtune.judge.association import judge_association
from embedtune.judge.likelihood import FLAWS, Pair, judge_likelihood
from embedtune.judge.score import Score, difference
from embedtune.judge.swaps import Reading, Swapped, judge_exposure, judge_swaps, judge_winobias, own_texts

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder
    from embedtune.encoder.load import Loaded

LIMITS = (
    "these scores say what vectors encode, not what an application does to people: the one hardly predicts the other "
    "(arXiv 2012.15859); measure your application too",
    "a score at its neutral value is no proof that a group is gone: look at what probes and neighbours still read "
    "(arXiv 1903.03862)",
    "WEAT: one-sided p of X with A, d is 0 to 2 in size; the words are American and few, and taken as given",
)


@dataclass(frozen=True)
class Asked:
    """What is measured besides the tests that come with the package: each where it is given."""

    crows: Sequence[Pair] = ()
    winobias: Sequence[Reading] = ()
    texts: Swapped | None = None  # the user's
    seed: int = 0


@dataclass(frozen=True)
class Bias:
    """The scores of one model, and what there is to say about them."""

    model: str
    scores: list[Score]
    remarks: list[str] = field(default_factory=list)


def judge_bias(encoder: Encoder, asked: Asked, masked: Loaded | None = None) -> Bias:
    """Measure all that the model supports: CrowS-Pairs needs `masked`, the same model with its masked-language head."""
    seed = asked.seed
    scores = [
        *judge_association(encoder, seed=seed),
        *judge_exposure(encoder, seed=seed),
        *judge_swaps(encoder, own_texts(), "jobs", seed=seed),
    ]
    if asked.texts:
        scores += judge_swaps(encoder, asked.texts, "data", seed=seed)
    if asked.winobias:
        scores += judge_winobias(encoder, asked.winobias, seed=seed)
    remarks: list[str] = []
    if asked.crows and masked:
        for scoring in ("shared", "changed"):
            found = judge_likelihood(masked, asked.crows, scoring)
            scores += found.scores()
            remarks += [f"CrowS {scoring}: {remark}" for remark in found.remarks]
    return Bias(encoder.name, scores, remarks)


def differences(base: Bias, other: Bias) -> dict[str, tuple[float, float, float]]:
    """For each score that both have on the same items: `other` minus `base`, with its 95 % interval."""
    known = {score.name: score for score in base.scores}
    return {
        score.name: difference(known[score.name], score)
        for score in other.scores
        if score.name in known and score.items == known[score.name].items
    }


def limits(asked: Asked) -> list[str]:
    """What such scores do not tell, in words."""
    return [*LIMITS, *([FLAWS] if asked.crows else [])]
