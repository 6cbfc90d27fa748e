"""What the user need not say: derived once from model, data and machine, written into recipe.toml, then reused."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedtune.encoder.device import fast_precision, free_bytes
from embedtune.fit import ranks
from embedtune.fit.engine import Objective, total_steps
from embedtune.recipes import Loop

# Tokens of a forward pass: on a CPU nothing was gained beyond these; on a GPU it is memory that decides.
MOST_TOKENS = {"cpu": 16_384, "cuda": 131_072}
COMPILED_FROM = 1000  # steps that pay for the half minute that it takes to compile


def config_of(body: Any) -> Any:
    """The config of a stock model, or of the one inside a sentence-transformers module."""
    return getattr(body, "config", None) or body.model.config


def widths(config: Any) -> tuple[int, int]:
    """Hidden and intermediate size of an encoder's layers."""
    return config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)


def token_budget(model: Any, max_length: int, bf16: bool, free: int, most: int) -> int:
    """Tokens per forward pass that fit into half of `free` bytes; between one full row and `most`.

    Per token and layer about 16 hidden-size and 4 intermediate-size activations are kept for the backward pass, and
    two rows of attention probabilities per head.
    """
    config = config_of(model)
    hidden, inner = widths(config)
    per_layer = 16 * hidden + 4 * inner + 2 * config.num_attention_heads * max_length
    per_token = config.num_hidden_layers * per_layer * (2 if bf16 else 4)
    return max(max_length, min(most, int(free / 2 / per_token)))


def resolve(loop: Loop, objective: Objective, max_length: int, lr: float) -> Loop:
    """`loop` with every derived field filled in; `lr` is what the task calls for."""
    device = next(objective.model.parameters()).device
    precision = loop.precision or fast_precision(device)
    total = total_steps(loop, objective.size, objective.head_steps)
    free = free_bytes(device) // (ranks.neighbours() if device.type == "cpu" else 1)
    most = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    budget = token_budget(objective.body, max_length, precision == "bf16", free, most)
    return dataclasses.replace(
        loop,
        lr=loop.lr or lr,
        precision=precision,
        compile=loop.compile if loop.compile is not None else device.type == "cuda" and total >= COMPILED_FROM,
        max_tokens=loop.max_tokens or min(budget, objective.most_tokens or budget),
        eval_steps=loop.eval_steps or max(1, -(-total // 10)),
        log_steps=loop.log_steps or max(1, total // 1000),
    )
