"""What the values of a recipe may be: every one out of its range is said, in words. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from embedtune import recipes, schema

Need = tuple[bool, str]  # whether it is met, and what to say where it is not


def problems(recipe: Any) -> list[str]:
    """Every value out of its range, in words."""
    found = schema.wrong_types(recipe)
    if found:
        return found
    return [message for ok, message in (*_loop_needs(recipe.loop), *_own_needs(recipe)) if not ok]


def _loop_needs(loop: recipes.Loop) -> list[Need]:
    needs = [
        (loop.lr is None or 0 < loop.lr < 1, f"lr must lie between 0 and 1, not {loop.lr}"),
        (loop.epochs is None or 0 < loop.epochs < math.inf, f"epochs must be positive and finite, not {loop.epochs}"),
        (loop.batch is None or loop.batch >= 1, f"batch must be at least 1, not {loop.batch}"),
        (0 <= loop.warmup < math.inf, f"warmup must not be negative, and finite, not {loop.warmup}"),
        (-(2**63) <= loop.seed < 2**63, f"seed must fit into 64 bits, not {loop.seed}"),
        (loop.clip > 0, f"clip must be positive, not {loop.clip}"),
        (
            0 <= loop.weight_decay < math.inf,
            f"weight_decay must not be negative, and finite, not {loop.weight_decay}",
        ),
        (0 < loop.layer_decay <= 1, f"layer_decay must be above 0 and at most 1, not {loop.layer_decay}"),
        (loop.minutes is None or loop.minutes > 0, f"minutes must be positive, not {loop.minutes}"),
    ]
    for name in ("max_steps", "max_tokens", "eval_steps", "patience", "checkpoint_steps", "log_steps"):
        value = getattr(loop, name)
        needs.append((value is None or value >= 1, f"{name} must be at least 1, not {value}"))
    return needs


def _own_needs(recipe: Any) -> list[Need]:
    if isinstance(recipe, recipes.Run):
        return _run_needs(recipe)
    shortest = 4 if isinstance(recipe, recipes.MLM) else 3
    needs = [
        (
            recipe.max_length is None or recipe.max_length >= shortest,
            f"max_length must be at least {shortest}, not {recipe.max_length}",
        ),
        (recipe.dev_rows >= 1, f"dev_rows must be at least 1, not {recipe.dev_rows}"),
    ]
    needs += _past_needs(recipe)
    if isinstance(recipe, recipes.Classify | recipes.Regress | recipes.Tag):
        return needs + _head_needs(recipe)
    if isinstance(recipe, recipes.MLM):
        return needs + _mlm_needs(recipe)
    return needs + (_contrastive_needs(recipe) if isinstance(recipe, recipes.Contrastive) else _scored_needs(recipe))


def _past_needs(recipe: Any) -> list[Need]:
    past = recipe.past
    other = past.continue_from is not None and recipe.model not in (None, past.continue_from)
    return [
        (0 <= past.replay < math.inf, f"replay must not be negative, and finite, not {past.replay}"),
        (
            past.continue_from is not None or past.replay == recipes.Past().replay,
            "replay is for a run that goes on: name it by continue_from",
        ),
        (not other, "model and continue_from exclude each other: a run goes on from the model of the run before"),
        (
            past.continue_from is None or not getattr(recipe, "scratch", False),
            "scratch and continue_from exclude each other: say one of them",
        ),
        (
            past.continue_from is None or not getattr(recipe, "on_the_fly", False),
            "on_the_fly and continue_from exclude each other: a run that goes on holds both texts in memory",
        ),
    ]


def _mlm_needs(recipe: recipes.MLM) -> list[Need]:
    return [
        (
            recipe.mask_rate is None or 0 < recipe.mask_rate < 1,
            f"mask_rate must lie between 0 and 1, not {recipe.mask_rate}",
        ),
        (recipe.add_words >= 0, f"add_words must not be negative, not {recipe.add_words}"),
        (recipe.vocab_size >= 200, f"vocab_size must be at least 200, not {recipe.vocab_size}"),
        (
            not (recipe.scratch and recipe.add_words),
            "add_words makes no sense with scratch: its vocabulary is made from the text",
        ),
    ]


def _contrastive_needs(recipe: recipes.Contrastive) -> list[Need]:
    ranking = recipe.ranking
    return [
        *_dims_needs(ranking.dims),
        (ranking.scale is None or 0 < ranking.scale < math.inf, f"scale must be positive, not {ranking.scale}"),
        (0 <= ranking.guide_margin < 2, f"guide_margin must lie between 0 and 2, not {ranking.guide_margin}"),
        _penalty_need(ranking.length_penalty),
        (
            recipe.train_length is None or recipe.train_length >= 3,
            f"train_length must be at least 3, not {recipe.train_length}",
        ),
        (recipe.dev_corpus >= 1, f"dev_corpus must be at least 1, not {recipe.dev_corpus}"),
        (
            recipe.loop.batch is None or recipe.loop.batch >= 2,
            f"batch must be at least 2: the other rows are the negatives; not {recipe.loop.batch}",
        ),
    ]


def _scored_needs(recipe: recipes.Scored) -> list[Need]:
    return [
        *_dims_needs(recipe.dims),
        _penalty_need(recipe.length_penalty),
        (
            recipe.loop.batch is None or recipe.loop.batch >= 2,
            f"batch must be at least 2: scores are learned by comparison; not {recipe.loop.batch}",
        ),
        (
            recipe.low is None or recipe.high is None or -math.inf < recipe.low < recipe.high < math.inf,
            f"low must lie below high, not {recipe.low} and {recipe.high}",
        ),
        (-1 <= recipe.pseudo_mean <= 1, f"pseudo_mean must lie between -1 and 1, not {recipe.pseudo_mean}"),
        (0 <= recipe.pseudo_spread <= 1, f"pseudo_spread must lie between 0 and 1, not {recipe.pseudo_spread}"),
    ]


def _head_needs(recipe: Any) -> list[Need]:
    rows, smooth = recipe.train_rows, getattr(recipe, "label_smoothing", 0.0)
    return [
        (rows is None or rows >= 2, f"train_rows must be at least 2, not {rows}"),
        (0 <= smooth < 1, f"label_smoothing must be at least 0 and below 1, not {smooth}"),
        (recipe.lora >= 0, f"lora must not be negative, not {recipe.lora}"),
        (not (recipe.lora and recipe.freeze), "lora and freeze exclude each other: say one of them"),
    ]


def _run_needs(recipe: recipes.Run) -> list[Need]:
    counts = [(getattr(recipe, name) >= 1, f"{name} must be at least 1, not {getattr(recipe, name)}")
              for name in ("pairs", "most_pairs", "test_rows", "test_corpus")]  # fmt: skip
    return [
        *counts,
        *_dims_needs(recipe.dims),
        (recipe.negatives >= 0, f"negatives must not be negative, not {recipe.negatives}"),
    ]


def _penalty_need(weight: float) -> Need:
    return 0 <= weight < math.inf, f"length_penalty must not be negative, and finite, not {weight}"


def _dims_needs(dims: tuple[int, ...]) -> list[Need]:
    return [
        (all(dim >= 1 for dim in dims), f"dims must be positive, not {', '.join(map(str, dims))}"),
        (len(set(dims)) == len(dims), f"dims must differ, not {', '.join(map(str, dims))}"),
    ]
