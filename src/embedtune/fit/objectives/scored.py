"""From a recipe to an objective: pairs of texts whose similarity shall follow a score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from embedtune import keyed
from embedtune.data.columns import parse_columns
from embedtune.data.divide import leaks, pair_groups
from embedtune.data.doctors import scale_of
from embedtune.data.pairs import ScoredPair, read_scored
from embedtune.data.read import Counts
from embedtune.encoder import load
from embedtune.encoder.device import pick_device
from embedtune.encoder.embedder import load_trainable
from embedtune.encoder.load import DEFAULT
from embedtune.errors import UserError, short_list
from embedtune.fit import past, ranking
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.objectives.contrastive import FEWEST, held_out
from embedtune.fit.objectives.embedding import EmbeddingObjective
from embedtune.fit.objectives.texts import Texts, row_length
from embedtune.fit.order import batch_rows
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost, token_profile
from embedtune.recipes import BATCH, Scored

RATE = 2e-5
MEASURES = ["spearman", "pearson"]
TEXT = "text"  # both sides are of one kind: the model's default prompt, if it has one
PSEUDO = 3  # what a key is for
FEWEST_DEV = 3
DRAWN = "the scores were drawn"


@dataclass(frozen=True)
class ScoredDev:
    """Pairs to score on: their texts' token rows (n,) each, and the scores (n,)."""

    pairs: list[ScoredPair]
    left: np.ndarray
    right: np.ndarray
    gold: np.ndarray


def prepare_scored(recipe: Scored, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised texts."""
    folder = load.find(recipe.model or DEFAULT)
    opened = load_trainable(folder)
    note(f"reading {name_of(recipe.train)}")
    sides = past.sides(recipe, _own_sides, KNOWN)
    pairs, dev, remarks = sides.train, sides.dev, sides.remarks
    # Scores that were drawn are on a scale of their own; else both files are on the same.
    apart = sides.about == DRAWN and recipe.dev is not None
    low, high = _range(pairs if apart else [*pairs, *dev], recipe.low, recipe.high)
    ends = _range(dev, None, None) if apart else (low, high)
    prompt = opened.model.prompts.get(opened.model.default_prompt_name or "") or ""
    texts = Texts()
    table, left_right = (
        np.array([[texts.number(TEXT, p.sentence1), texts.number(TEXT, p.sentence2)] for p in side])
        for side in (pairs, dev)
    )
    max_length = row_length(opened, folder, recipe.max_length)
    tokens = texts.tokenize(opened.model.tokenizer, {TEXT: prompt}, max_length, home / "data" / "texts")
    if tokens.chunked:
        remarks.append(f"{tokens.chunked:,} of {len(tokens):,} texts are longer than {max_length} tokens: cut to them")
    labels = torch.tensor([_scaled(p.score or 0.0, low, high) for p in pairs], dtype=torch.float32)
    opened.model.to(pick_device())
    noise = KeyedNoise(recipe.loop.seed)
    key_dropout(opened.model, noise)
    loss = _loss(recipe, int(opened.model.get_embedding_dimension()), labels)
    loss = ranking.with_length_penalty(loss, table, tokens, recipe.length_penalty)
    batch, seed = recipe.loop.batch or BATCH, recipe.loop.seed
    objective = EmbeddingObjective(
        opened.model, tokens, table, loss, lambda step: batch_rows(step, batch, len(table), seed), noise,
        ["dev_loss", *(f"dev_{name}" for name in MEASURES)], opened.padded,
        texts.prompt_lengths(opened, {TEXT: prompt}), opened.config_values,
    )  # fmt: skip
    if opened.padded:
        remarks.append(f"this architecture runs padded, sorted by length: {opened.padded}")
    profile = {
        **data_profile(recipe.train, sides.counts, sides.dev_counts),
        "pairs": len(pairs),
        "dev_pairs": len(dev),
        **{"score_low": low, "score_high": high, "score_mean": float(np.mean([p.score or 0.0 for p in pairs]))},
        "cut_texts": tokens.chunked,
        **token_profile(tokens.spread()),
    }
    resolved = dataclasses.replace(
        recipe, model=recipe.model or DEFAULT, max_length=max_length, low=float(low), high=float(high)
    )
    gold = np.array([_scaled(p.score or 0.0, *ends) for p in dev])
    same = identity(folder, opened.model.tokenizer, sides.counts, sides.dev_counts) | sides.identity()
    return Prepared(
        objective, resolved, Path(str(resolved.model)).name, max_length, profile, same, remarks, RATE,
        f"dev_{MEASURES[0]}", folder, ScoredDev(dev, left_right[:, 0], left_right[:, 1], gold), sides.old,
        tuple(text for _, text in texts.numbers),
    )  # fmt: skip


def _own_sides(recipe: Scored, folder: Path | None) -> Sides:
    """The pairs that a recipe names, with scores, parted."""
    counts, columns = Counts(), parse_columns(recipe.columns)
    pairs = list(read_scored(recipe.train, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
    if len(pairs) < FEWEST:
        raise UserError(f"has {len(pairs)} pair(s): too few to learn from", where=name_of(recipe.train))
    remarks, about = rows_lost(counts), DRAWN if pairs[0].score is None else None
    pairs = _with_scores(pairs, recipe, remarks)
    pairs, dev, dev_counts = _dev_pairs(pairs, recipe, columns, remarks)
    return Sides(pairs, dev, counts, dev_counts, remarks, about)


def _with_scores(pairs: list[ScoredPair], recipe: Scored, remarks: list[str]) -> list[ScoredPair]:
    """The pairs, with pseudo-scores where there are none: keyed draws around a mean, kept within -1 and 1."""
    without = sum(pair.score is None for pair in pairs)
    if not without:
        return pairs
    if without < len(pairs):
        where = name_of(recipe.train)
        raise UserError(f"{without:,} of {len(pairs):,} pairs have no score, the others have one", where=where)
    noise = keyed.uniform(keyed.key(recipe.loop.seed, PSEUDO, np.arange(len(pairs))))
    drawn = recipe.pseudo_mean + recipe.pseudo_spread * ndtri(np.clip(noise, 1e-9, 1 - 1e-9))
    remarks.append(
        f"no scores: pseudo-scores around {recipe.pseudo_mean:g} (standard deviation {recipe.pseudo_spread:g}) were "
        "drawn. They say only that all pairs are alike: with nothing dissimilar to learn from, all vectors may move "
        "together, and dev measures mean little. `embedtune fit contrastive` makes more of such pairs"
    )
    return [dataclasses.replace(p, score=float(s)) for p, s in zip(pairs, np.clip(drawn, -1, 1), strict=True)]


def _range(pairs: Sequence[ScoredPair], low: float | None, high: float | None) -> tuple[float, float]:
    """The scale of the scores: as the recipe says, else the one that the doctor sees in them."""
    sources = list(dict.fromkeys(pair.file for pair in pairs))
    where = short_list(sources)
    scores = np.array([pair.score for pair in pairs], float)
    guess = scale_of(scores) or (None, None)
    low = low if low is not None else guess[0]
    high = high if high is not None else guess[1]
    if low is None or high is None:
        what = f"scores run from {scores.min():g} to {scores.max():g}, on no scale that is known"
        raise UserError(what, where=where, fix="say the scale with --low and --high")
    beyond = sorted((p.file, p.number, p.score) for p in pairs if not low <= (p.score or 0.0) <= high)
    outside = [f"{file + ', ' if len(sources) > 1 else ''}row {number:,}: {s:g}" for file, number, s in beyond]
    if outside:
        what = f"{len(outside):,} of {len(pairs):,} scores lie outside of {low:g} to {high:g}"
        fix = "mend them, or set --low and --high"
        raise UserError(what, where=where, details=[short_list(outside)], fix=fix)
    if scores.min() == scores.max():
        what = f"all {len(scores):,} scores are {scores[0]:g}: there is nothing to learn"
        raise UserError(what, where=where, fix="check --columns score=NAME (or --pseudo-spread)")
    return float(low), float(high)


def _scaled(score: float, low: float, high: float) -> float:
    """A score as the losses take it: 0 to 1, or -1 to 1 where the scale goes below zero."""
    return score / max(-low, high) if low < 0 else (score - low) / (high - low)


def _dev_pairs(
    pairs: list[ScoredPair], recipe: Scored, columns: dict[str, str], remarks: list[str]
) -> tuple[list[ScoredPair], list[ScoredPair], Counts | None]:
    """The pairs to train on, those to score on, and the tally of the dev file where there is one."""
    if recipe.dev is None:
        groups = pair_groups(pairs)
        held = held_out(groups, min(recipe.dev_rows, len(pairs) // 10), recipe.loop.seed)
        remarks.append(f"held out {held.sum():,} of {len(pairs):,} pairs, in whole groups that share a text")
        train, dev, counts = [p for p, h in zip(pairs, held) if not h], [p for p, h in zip(pairs, held) if h], None
    else:
        train, counts = pairs, Counts()
        dev = list(read_scored(recipe.dev, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
        remarks += rows_lost(counts)
        if any(pair.score is None for pair in dev):
            raise UserError("has pairs without a score: there is nothing to score on", where=name_of(recipe.dev))
        _refuse_leaks(pairs, dev, recipe, remarks)
        if len(dev) > recipe.dev_rows:
            remarks.append(f"scored on the first {recipe.dev_rows:,} of {len(dev):,} dev pairs (--dev-rows)")
            dev = dev[: recipe.dev_rows]
    if len(dev) < FEWEST_DEV:
        fix = "give more and more varied pairs, or a file of its own to score on with --dev FILE"
        what = f"{len(dev):,} pair(s) to score on, of {len(pairs):,}: a correlation needs {FEWEST_DEV}"
        raise UserError(
            f"{what}; a tenth at most is held out, in whole groups that share a text", where="--dev", fix=fix
        )
    return train, dev, counts


def _either_way(pair: ScoredPair) -> str:
    """Both texts of a pair, whichever comes first."""
    return "\n".join(sorted((pair.sentence1, pair.sentence2)))


def _refuse_leaks(pairs: list[ScoredPair], dev: list[ScoredPair], recipe: Scored, remarks: list[str]) -> None:
    """Dev pairs that training has too, either way round, are an error."""
    found = leaks(map(_either_way, pairs), map(_either_way, dev))
    if not found.exact and not found.near:
        return
    what = f"{found.exact:,} of {len(dev):,} dev pairs stand in the training data too, {found.near:,} nearly"
    if not recipe.allow_leaks:
        fix = "embedtune data split FILE --by cluster makes clean parts; --allow-leaks goes on all the same"
        raise UserError(what, where=name_of(recipe.dev), details=list(found.examples), fix=fix)
    remarks.append(f"{what}: their scores flatter (--allow-leaks)")


def _loss(recipe: Scored, dimension: int, labels: Tensor) -> Callable[[Tensor, np.ndarray, np.ndarray], Tensor]:
    if too_big := [dim for dim in recipe.dims if dim > dimension]:
        raise UserError(f"{too_big[0]} dimensions are more than the model's {dimension}", where="--dims")
    stock = ranking.stock_loss(recipe.loss, dimension, {})
    ranking.check_loss(stock, recipe.loss, dimension, 2, scored=True)
    loss = ranking.matryoshka(stock, recipe.dims) if recipe.dims else stock

    def applied(vectors: Tensor, place: np.ndarray, rows: np.ndarray) -> Tensor:
        columns = [vectors.index_select(0, torch.from_numpy(column).to(vectors.device)) for column in place.T]
        return loss(columns, labels[torch.from_numpy(rows)].to(vectors.device))

    return applied


KNOWN = Known(key=_either_way, held=_either_way)
