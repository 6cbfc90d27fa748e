"""What is done to a trained model before it is written: averaged with its base, length erased in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedtune.tune import BASE, CHECKPOINTS

ERASED_ON = 100_000  # texts that an erasure is fitted on, at most


def average(scores: dict[str, Any], scorer: Any, best_step: int, measure: str, listener: Any) -> None:
    """Average the best weights with the base, the coefficient chosen on dev; the scores become those of the result."""
    from embedtune.fit import merge
    from embedtune.fit.engine import better

    if best_step == 0:
        return
    model, found = scorer.prepared.objective.model, {}
    base = merge.base_weights(scorer.prepared.base, merge.weights(model))

    def score(coefficient: float) -> float:
        found[coefficient] = scorer(f"average-{coefficient:g}")
        listener.note(
            f"averaged {coefficient:g} with the base: {measure.replace('_', ' ')} {found[coefficient][measure]:.4f}"
        )
        return found[coefficient][measure]

    ends = (scores["baseline"][measure], scores["tuned"][measure])
    chosen, tried = merge.choose(model, base, score, lambda a, b: better(measure, a, b), ends)
    scores["averaging"] = {
        "coefficient": chosen,
        "tried": {f"{k:g}": v for k, v in tried.items()},
        "last": scores["tuned"],
    }
    if chosen in found:
        scores["tuned"] = found[chosen]
        scores["difference"] = dataclasses.asdict(scorer.difference(0, f"average-{chosen:g}"))
        scores |= scorer.verdict(0, f"average-{chosen:g}")
    elif chosen == 0:
        scores["tuned"], scores["difference"] = scores["baseline"], None
        scores |= scorer.verdict(0, 0)


def without_length(scores: dict[str, Any], scorer: Any, out: Path) -> Callable[[Path], None]:
    """Erase length from the model by one map at its end; the scores become those of the result.

    A penalty makes the covariance small on batches, only the closed form makes it zero. Returns what adds the record
    of the erasure to the folder, once the model is written there.
    """
    from embedtune.refine import bake, erase, sidecar
    from embedtune.refine.cached import cached_of

    objective, prepared = scorer.prepared.objective, scorer.prepared
    texts, tokens = objective.trained_texts(ERASED_ON)
    normalised = bake.take_normalize(objective.model)
    cached = cached_of(objective.vectors(texts), tokens)
    applied = erase.apply(objective.model, normalised, cached, erase.Erasure(length=True), (), out)
    scores["before_erasure"], scores["tuned"] = scores["tuned"], scorer("erased")
    scores["difference"] = dataclasses.asdict(scorer.difference(0, "erased"))
    scores |= scorer.verdict(0, "erased")
    scores["erasure"] = [*applied.erased.figures(), *applied.erased.remarks]
    digests = [sidecar.digest(prepared.texts[number]) for number in texts]
    name = f"{out.name} before its erasure"

    def record(folder: Path) -> None:
        passing = (f"{CHECKPOINTS}/", f"{BASE}/")  # parts of the running folder, gone when it is published
        sums = {path: each for path, each in bake.weight_sums(folder).items() if not path.startswith(passing)}
        applied.record(folder, name, prepared.profile["sha256"], sums, digests)

    return record
