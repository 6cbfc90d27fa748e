"""From a recipe to an objective: open the model, read and tokenise the text, hold rows out, choose the masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedtune import files
from embedtune.data import vocabulary
from embedtune.data.columns import parse_columns
from embedtune.data.read import read_texts
from embedtune.encoder import load, scratch
from embedtune.encoder.device import pick_device
from embedtune.encoder.load import DEFAULT, Loaded
from embedtune.encoder.vocabulary import add_words
from embedtune.fit import ranks
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.engine import total_steps
from embedtune.fit.objectives import raw_text
from embedtune.fit.objectives.mlm import MaskedLanguageModel, Masker
from embedtune.fit.objectives.raw_text import Text
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost
from embedtune.recipes import MLM

# Peak learning rates that did well on medical text and docstrings; published recipes use 5e-5 with a trained head.
RATES = {"own head": 5e-5, "fresh head": 2e-4, "scratch": 5e-4}
HEAD_SHARE, MOST_HEAD_STEPS = 0.1, 300  # of the steps, a fresh head is trained alone this long


def prepare_mlm(recipe: MLM, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised text (and the base model of --scratch)."""
    columns = parse_columns(recipe.columns)
    loaded = _open_model(recipe, columns, home)
    remarks: list[str] = []
    words = None
    if recipe.add_words:
        words = _grow_vocabulary(recipe, loaded, columns, remarks)
    max_length = raw_text.row_length(recipe, loaded)
    recipe = dataclasses.replace(recipe, on_the_fly=raw_text.on_the_fly(recipe))
    note(f"reading {'' if recipe.on_the_fly else 'and tokenising '}{name_of(recipe.train)}")
    text = raw_text.read(recipe, loaded, home / "data", remarks)
    sides = text.sides
    rate = recipe.mask_rate or (0.30 if loaded.model.config.model_type == "modernbert" else 0.15)
    head_steps = _head_steps(recipe, loaded, len(sides.train))
    if loaded.fresh:
        _start_at_frequencies(loaded, text)
    noise = KeyedNoise(recipe.loop.seed)
    loaded.model.to(pick_device())
    key_dropout(loaded.model, noise)
    fresh = [name for name, _ in loaded.model.named_parameters() if name in set(loaded.fresh)]
    masker = Masker.of(loaded.tokenizer, recipe.whole_words)
    objective = MaskedLanguageModel(loaded, text.tokens, sides.train, text.dev, sides.dev, rate, recipe.loop.seed,
                                    head_steps, noise, masker, fresh)  # fmt: skip
    said = [*rows_lost(text.counts), *text.remarks(max_length), *_remarks(loaded, head_steps)]
    resolved = dataclasses.replace(
        recipe,
        model=recipe.model or (DEFAULT if not recipe.scratch else "bert"),
        max_length=max_length,
        mask_rate=rate,
        head_steps=head_steps,
    )
    profile = data_profile(recipe.train, text.counts, text.dev_counts) | text.profile()
    if words:
        profile["vocabulary"] = words
    rate = RATES["scratch" if recipe.scratch else "fresh head" if loaded.fresh else "own head"]
    same = identity(loaded.folder, loaded.tokenizer, text.counts, text.dev_counts) | text.more
    return Prepared(objective, resolved, _model_name(resolved), max_length, profile, same, [*said, *remarks], rate,
                    measure="dev_loss", base=loaded.folder, old=text.old)  # fmt: skip


def _model_name(recipe: MLM) -> str:
    return f"{recipe.model} from scratch" if recipe.scratch else Path(str(recipe.model)).name


def _open_model(recipe: MLM, columns: dict[str, str], home: Path) -> Loaded:
    seed = recipe.loop.seed
    if not recipe.scratch:
        return load.load_mlm(load.find(recipe.model or DEFAULT), seed)
    base, kind, texts = home / "base", recipe.model or "bert", _Texts(recipe, columns)

    def make() -> None:
        if files.damage(base) is not None:  # a resumed run goes on with the base that it was started from
            files.write_directory(base, lambda p: scratch.make(kind, texts, recipe.vocab_size, seed, p), {"kind": kind})

    ranks.first(make)
    return load.load_mlm(base, seed)


@dataclass(frozen=True)
class _Texts:
    """The training texts, from the start whenever they are asked for."""

    recipe: MLM
    columns: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        rows = read_texts(self.recipe.train, columns=self.columns, bad_rows=self.recipe.bad_rows)
        return (row.values["text"] for row in rows)


def _head_steps(recipe: MLM, loaded: Loaded, rows: int) -> int:
    if not loaded.fresh or recipe.scratch:
        return 0
    if recipe.head_steps is not None:
        return recipe.head_steps
    return min(MOST_HEAD_STEPS, max(1, int(HEAD_SHARE * total_steps(recipe.loop, rows, 0))))


@torch.no_grad()
def _start_at_frequencies(loaded: Loaded, text: Text) -> None:
    """A fresh head's bias starts at the log frequency of each token in the training rows.

    It then has nothing to learn that counting can tell: its first loss is the entropy of the words, not the log of
    the vocabulary's size (10.7 became 7.6 on medical text), and the steps go into the language.
    """
    head = loaded.model.get_output_embeddings()
    if head is None or head.bias is None:
        return
    counts = text.frequencies(len(head.bias))
    counts[loaded.tokenizer.all_special_ids] = 0
    head.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())))


def _grow_vocabulary(recipe: MLM, loaded: Loaded, columns: dict[str, str], remarks: list[str]) -> dict[str, Any]:
    rows = read_texts(recipe.train, columns=columns, bad_rows=recipe.bad_rows)
    words = vocabulary.count_words(rows, loaded.tokenizer)
    before = vocabulary.pieces_per_word(words, loaded.tokenizer)
    added = add_words(loaded, vocabulary.shattered(words, loaded.tokenizer, recipe.add_words))
    after = vocabulary.pieces_per_word(words, loaded.tokenizer)
    remarks.append(f"new vocabulary: {added:,} words; pieces per word {before:.4f} before, {after:.4f} after")
    if words.forgotten:
        remarks.append(f"{words.forgotten:,} rare words were not counted (memory)")
    return {"added_words": added, "pieces_per_word_before": before, "pieces_per_word_after": after}


def _remarks(loaded: Loaded, head_steps: int) -> list[str]:
    out = []
    if loaded.fresh and head_steps:
        out.append(
            f"the model has no masked-language head: a fresh one, tied to its word embeddings, is trained alone "
            f"for the first {head_steps:,} steps"
        )
    if loaded.config_values:
        out.append(
            "dropout on attention probabilities is off (docs/why.md); hidden dropout is as the model's config says"
        )
    if loaded.padded:
        out.append(f"this architecture runs padded, sorted by length: {loaded.padded}")
    return out
