"""From a recipe to an objective: open the model, read and tokenise the text, hold rows out, choose the masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedtune import files
from embedtune.data import split, vocabulary
from embedtune.data.clean import text_hash
from embedtune.data.columns import parse_columns
from embedtune.data.read import Counts, Row, read_texts
from embedtune.data.tokens import Tokens, numbered, tokenize
from embedtune.encoder import load, scratch
from embedtune.encoder.device import pick_device
from embedtune.encoder.load import DEFAULT, Loaded
from embedtune.encoder.vocabulary import add_words
from embedtune.errors import UserError
from embedtune.fit import past, ranks
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.engine import total_steps
from embedtune.fit.objectives.mlm import MaskedLanguageModel, Masker
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost, token_profile, tokenised
from embedtune.recipes import MLM

COUNTED = 10_000_000  # tokens counted at once
# Peak learning rates that did well on medical text and docstrings; published recipes use 5e-5 with a trained head.
RATES = {"own head": 5e-5, "fresh head": 2e-4, "scratch": 5e-4}
BARREN = "nothing in them that the tokenizer knows"
HEAD_SHARE, MOST_HEAD_STEPS = 0.1, 300  # of the steps, a fresh head is trained alone this long


def prepare_mlm(recipe: MLM, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised text (and the base model of --scratch)."""
    columns = parse_columns(recipe.columns)
    loaded = _open_model(recipe, columns, home)
    remarks: list[str] = []
    words = None
    if recipe.add_words:
        words = _grow_vocabulary(recipe, loaded, columns, remarks)
    max_length = _row_length(recipe, loaded)
    note(f"reading and tokenising {name_of(recipe.train)}")
    read = _both_runs if recipe.past.continue_from else _read
    text = read(recipe, loaded, max_length, home / "data", remarks)
    counts, dev_counts, tokens, dev_tokens, sides = text.counts, text.dev_counts, text.tokens, text.dev, text.sides
    rate = recipe.mask_rate or (0.30 if loaded.model.config.model_type == "modernbert" else 0.15)
    head_steps = _head_steps(recipe, loaded, len(sides.train))
    if loaded.fresh:
        _start_at_frequencies(loaded, tokens, sides.dev if dev_tokens is tokens else sides.dev[:0])
    noise = KeyedNoise(recipe.loop.seed)
    loaded.model.to(pick_device())
    key_dropout(loaded.model, noise)
    fresh = [name for name, _ in loaded.model.named_parameters() if name in set(loaded.fresh)]
    masker = Masker.of(loaded.tokenizer, recipe.whole_words)
    objective = MaskedLanguageModel(loaded, tokens, sides.train, dev_tokens, sides.dev, rate, recipe.loop.seed,
                                    head_steps, noise, masker, fresh)  # fmt: skip
    lost = counts.used - tokens.lines if text.old is None else 0  # else said already
    remarks = [*_remarks(loaded, counts, tokens, head_steps, max_length, lost), *remarks]
    resolved = dataclasses.replace(
        recipe,
        model=recipe.model or (DEFAULT if not recipe.scratch else "bert"),
        max_length=max_length,
        mask_rate=rate,
        head_steps=head_steps,
    )
    profile = {
        **data_profile(recipe.train, counts, dev_counts),
        "rows": len(tokens),
        "train_rows": len(sides.train),
        "dev_rows": len(sides.dev),
        "chunked_lines": tokens.chunked,
        **token_profile(tokens.lengths()),
    }
    if words:
        profile["vocabulary"] = words
    rate = RATES["scratch" if recipe.scratch else "fresh head" if loaded.fresh else "own head"]
    same = identity(loaded.folder, loaded.tokenizer, counts, dev_counts) | text.more
    return Prepared(objective, resolved, _model_name(resolved), max_length, profile, same, remarks, rate,
                    measure="dev_loss", base=loaded.folder, old=text.old)  # fmt: skip


@dataclass(frozen=True)
class _Text:
    """Text as token rows, and which of them are trained and scored on; `more` as `Sides` says it of all tasks."""

    counts: Counts
    dev_counts: Counts | None
    tokens: Tokens
    dev: Tokens
    sides: split.Split
    old: int | None = None
    more: dict[str, str] = field(default_factory=dict)


def _read(recipe: MLM, loaded: Loaded, max_length: int, home: Path, remarks: list[str]) -> _Text:
    """The text that a recipe names, parted."""
    columns = parse_columns(recipe.columns)
    counts, tokens = _tokens(recipe.train, recipe, columns, loaded, max_length, home / "train")
    if recipe.dev is None:
        return _Text(counts, None, tokens, tokens, _held_out(tokens, recipe, remarks))
    dev_counts, dev = _tokens(recipe.dev, recipe, columns, loaded, max_length, home / "dev")
    return _Text(counts, dev_counts, tokens, dev, _given_dev(tokens, dev, recipe.dev_rows, remarks))


def _both_runs(recipe: MLM, loaded: Loaded, max_length: int, home: Path, remarks: list[str]) -> _Text:
    """The new text with a sample of the old, as rows of their own, and the dev rows of both.

    Lines are what is drawn and left out, so both texts pass through memory.
    """

    def own(each: MLM, folder: Path | None) -> Sides:
        """A line with a held-out chunk is held out whole."""
        opened = loaded if folder is None else load.load_mlm(folder, each.loop.seed)
        said: list[str] = []
        place = home / (f"run-{text_hash(str(folder.resolve())):x}" if folder else "new")
        text = _read(each, opened, _row_length(each, opened), place, said)
        held = _lines_of(text.dev, text.sides.dev)
        read = partial(read_texts, columns=parse_columns(each.columns), bad_rows=each.bad_rows)
        dev = [row for row, line in numbered(read(each.train if each.dev is None else each.dev)) if line in held]
        train = [row for row, line in numbered(read(each.train)) if each.dev is not None or line not in held]
        return Sides(train, dev, text.counts, text.dev_counts, said)

    both = past.sides(recipe, own, Known(key=_line, held=_line, join=_joined))
    remarks += both.remarks
    train, dev = (
        tokenised(tokenize, rows, loaded.tokenizer, max_length, home / name)
        for name, rows in (("train", both.train), ("dev", both.dev))
    )
    if lost := len(both.train) + len(both.dev) - train.lines - dev.lines:
        remarks.append(f"{lost:,} rows left out: {BARREN}")
    whole = split.Split(np.arange(len(train)), np.arange(len(dev)), 0)
    documents = {row.document for row in both.dev[: both.old]}
    old = int(np.isin(dev.document, list(documents)).sum())
    return _Text(both.counts, both.dev_counts, train, dev, whole, old, both.identity())


def _line(row: Row) -> str:
    return str(row.values["text"])


def _lines_of(tokens: Tokens, rows: np.ndarray) -> set[tuple[int, int]]:
    """(document, line) of these token rows."""
    return set(zip(tokens.document[rows].tolist(), tokens.line[rows].tolist()))


def _joined(old: list[Row], new: list[Row]) -> list[Row]:
    """The rows of both, with other documents."""
    first = max((row.document for row in old), default=-1) + 1
    return [*old, *(dataclasses.replace(row, document=first + row.document) for row in new)]


def _held_out(tokens: Tokens, recipe: MLM, remarks: list[str]) -> split.Split:
    sides = split.hold_out(tokens, recipe.dev_rows, recipe.loop.seed)
    remarks.append(
        f"held out {len(sides.dev):,} of {len(tokens):,} rows, in whole documents or runs of neighbouring lines; "
        f"{sides.moved:,} near-duplicates of training rows went back"
    )
    return sides


def _given_dev(tokens: Tokens, dev_tokens: Tokens, most: int, remarks: list[str]) -> split.Split:
    train, dev = np.arange(len(tokens)), np.arange(len(dev_tokens))[:most]
    if len(dev_tokens) > len(dev):
        remarks.append(f"scored on the first {len(dev):,} of {len(dev_tokens):,} dev rows (--dev-rows)")
    if leaked := len(split.also_in(tokens, train, dev, dev_tokens)):
        remarks.append(f"{leaked:,} of {len(dev):,} dev rows also stand in the training text: their scores flatter")
    return split.Split(train, dev, 0)


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


def _row_length(recipe: MLM, loaded: Loaded) -> int:
    most = loaded.model.config.max_position_embeddings - loaded.offset
    if recipe.max_length is not None and recipe.max_length > most:
        raise UserError(
            f"{recipe.max_length} tokens are more than the {most} positions of the model", where="--max-length"
        )
    return recipe.max_length or loaded.max_length


def _tokens(
    data: Any, recipe: MLM, columns: dict[str, str], loaded: Loaded, max_length: int, folder: Path
) -> tuple[Counts, Tokens]:
    counts = Counts()
    rows = read_texts(data, columns=columns, bad_rows=recipe.bad_rows, counts=counts)
    tokens = tokenised(tokenize, rows, loaded.tokenizer, max_length, folder)
    if not len(tokens):
        raise UserError("has no text that the tokenizer turns into tokens", where=name_of(data))
    return counts, tokens


def _head_steps(recipe: MLM, loaded: Loaded, rows: int) -> int:
    if not loaded.fresh or recipe.scratch:
        return 0
    if recipe.head_steps is not None:
        return recipe.head_steps
    return min(MOST_HEAD_STEPS, max(1, int(HEAD_SHARE * total_steps(recipe.loop, rows, 0))))


@torch.no_grad()
def _start_at_frequencies(loaded: Loaded, tokens: Tokens, dev: np.ndarray) -> None:
    """A fresh head's bias starts at the log frequency of each token in the training rows.

    It then has nothing to learn that counting can tell: its first loss is the entropy of the words, not the log of
    the vocabulary's size (10.7 became 7.6 on medical text), and the steps go into the language.
    """
    head = loaded.model.get_output_embeddings()
    if head is None or head.bias is None:
        return
    size = len(head.bias)
    counts = np.zeros(size)
    for start in range(0, len(tokens.ids), COUNTED):
        counts += np.bincount(tokens.ids[start : start + COUNTED], minlength=size)
    for row in dev:
        counts -= np.bincount(tokens.row(row), minlength=size)
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


def _remarks(loaded: Loaded, counts: Counts, tokens: Tokens, head_steps: int, max_length: int, lost: int) -> list[str]:
    out = rows_lost(counts)
    if lost:
        out.append(f"{lost:,} rows left out: {BARREN}")
    if tokens.chunked:
        out.append(f"{tokens.chunked:,} rows longer than {max_length} tokens were chunked, none cut")
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
