"""What classify, regress and tag share: rows drawn and held out, and a head made ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from embedtune import keyed
from embedtune.data.divide import leaks
from embedtune.data.stratify import take
from embedtune.encoder import heads, varlen
from embedtune.encoder.device import pick_device
from embedtune.encoder.load import Loaded
from embedtune.errors import UserError
from embedtune.fit import probe
from embedtune.fit.dropout import KeyedNoise, key_dropout

T = TypeVar("T")
DRAW, HOLD = 5, 6  # what a key is for
FEWEST = 8
FAR = 10.0  # of a logit: as good as certain
RATES = {"tune": 5e-5, "lora": 5e-4, "freeze": 1e-3}  # peak learning rates


@dataclass(frozen=True)
class HeadDev:
    """What a head is scored on: token rows, and what is right.

    `gold`: class numbers (n,), 0/1 (n, C) where several labels apply, scores (n,), or a list of tags a sentence.
    `baselines`: by the name of what made them, predictions: probabilities (n, C), scores (n,), or probabilities
    (words, C) a sentence.
    """

    rows: np.ndarray
    gold: Any
    items: tuple[str, ...]
    classes: tuple[str, ...]
    multi: bool
    baselines: dict[str, Any]
    join: Callable[[list[np.ndarray]], Any] | None = None  # of tagging: predictions of rows to those of sentences


def draw(rows: list[T], most: int | None, seed: int) -> list[T]:
    """At most so many rows, drawn by key, in their own order."""
    if most is None or len(rows) <= most:
        return rows
    chosen = np.sort(np.argsort(keyed.key(seed, DRAW, np.arange(len(rows))), kind="stable")[:most])
    return [rows[number] for number in chosen]


def held_out(classes: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: about `share` of the rows of each class ((n,) numbers), at least one, in whole `groups` (n,)."""
    counts = np.eye(int(classes.max()) + 1, dtype=np.int64)[classes]
    quota = np.maximum(1, np.round(counts.sum(0) * share)).astype(np.int64)
    return take(counts, groups, quota, seed, HOLD)


def say_leaks(train: Sequence[str], dev: Sequence[str], remarks: list[str]) -> None:
    """A remark where texts of the dev data stand in the training data too, exactly or nearly."""
    found = leaks(train, dev)
    if found.exact or found.near:
        remarks.append(
            f"{found.exact:,} of {len(dev):,} dev texts stand in the training data too, {found.near:,} nearly: their "
            "scores flatter (embedtune data split --by cluster makes clean parts)"
        )


def row_length(loaded: Loaded, asked: int | None) -> int:
    """Tokens of a row: `asked`, or what the model says; a UserError beyond its positions."""
    most = loaded.model.config.max_position_embeddings - varlen.position_offset(loaded.model)
    if asked is not None and asked > most:
        raise UserError(f"{asked} tokens are more than the {most} positions of the model", where="--max-length")
    loaded.max_length = asked or loaded.max_length
    return loaded.max_length


def make_ready(loaded: Loaded, recipe: Any, remarks: list[str]) -> tuple[KeyedNoise, float]:
    """Adapters, freezing, device and keyed dropout; gives the noise and the peak rate where the recipe names none."""
    head = set(heads.parameters(loaded))
    how = "freeze" if recipe.freeze else "lora" if recipe.lora else "tune"
    if recipe.lora:
        count = heads.add_lora(loaded, recipe.lora, recipe.loop.seed)
        remarks.append(f"LoRA of rank {recipe.lora} beside {count} linear layers; merged into the weights when saved")
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(how == "tune" or name in head or (how == "lora" and ".lora_" in name))
    loaded.model.to(pick_device())
    noise = KeyedNoise(recipe.loop.seed)
    key_dropout(loaded.model, noise)
    if how == "freeze":
        remarks.append("the encoder is frozen: only the head is trained (a linear probe on what the stock head reads)")
    if loaded.padded:
        remarks.append(f"this architecture runs padded, sorted by length: {loaded.padded}")
    if loaded.config_values:
        remarks.append(
            "dropout on attention probabilities is off (docs/why.md); hidden dropout is as the model's config says"
        )
    return noise, RATES[how]


def start_at_probe(layer: torch.nn.Linear, linear: probe.Linear) -> None:
    """Start a fresh head's last layer at a linear probe of what it reads.

    From a random start the head pulls the encoder about before it says anything (arXiv 2202.10054); and with many
    classes, or words of which few are entities, a small run ends before it has learned to.
    """
    weights, biases = linear
    # What no row has, or all, stays learnable.
    biases = np.nan_to_num(biases, posinf=FAR, neginf=np.min(biases[np.isfinite(biases)], initial=0.0) - FAR)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
        layer.bias.copy_(torch.from_numpy(biases))


def model_name(recipe: Any) -> str:
    """The model's name in a title."""
    from embedtune.encoder.load import DEFAULT

    return Path(str(recipe.model or DEFAULT)).name
