"""Averaging a tuned model with its base (arXiv 2203.05482, 2311.13534): what was learned, with less of it forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedtune.encoder.embedder import load_trainable
from embedtune.errors import UserError

GRID = (0.25, 0.5, 0.75)  # tried between the base (0) and the tuned model (1)


@torch.no_grad()
def set_average(model: Any, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], coefficient: float) -> None:
    """Give `model` the weights base + coefficient (tuned - base), in place; the names of both must be its own."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(base[name].to(parameter.device), tuned[name].to(parameter.device), coefficient))


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of the model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def base_weights(folder: Path, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the model in `folder`; a UserError where they are not those of `tuned` in name and shape."""
    found = weights(load_trainable(folder).model)
    differ = [n for n in {*found, *tuned} if n not in found or n not in tuned or found[n].shape != tuned[n].shape]
    if differ:
        raise UserError(
            f"cannot be averaged with the tuned model: {len(differ)} weights differ in name or shape",
            where=str(folder),
            details=sorted(differ)[:3],
            fix="average a model with the very base it was tuned from",
        )
    return found


def choose(
    model: Any,
    base: Mapping[str, Tensor],
    score: Callable[[float], float],
    better: Callable[[float, float], bool],
    ends: tuple[float, float],
    grid: Sequence[float] = GRID,
) -> tuple[float, dict[float, float]]:
    """The coefficient with the best score, and all scores; `model` is left with its weights.

    `model` comes with the tuned weights. `score(coefficient)` scores it as it then is; `ends` are the scores at 0 and
    1, known already. Where two are equal the larger coefficient stays: nothing speaks against what was learned.
    """
    tuned = weights(model)
    scores = {0.0: ends[0], 1.0: ends[1]}
    for coefficient in grid:
        set_average(model, base, tuned, coefficient)
        scores[coefficient] = score(coefficient)
    best = 1.0
    for coefficient in sorted(scores, reverse=True):
        if better(scores[coefficient], scores[best]):
            best = coefficient
    set_average(model, base, tuned, best)
    return best, dict(sorted(scores.items()))
