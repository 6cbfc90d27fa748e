"""Raw text as rows to train and to score on: tokenised before training, or on the fly where there is too much of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import keyed
from embedtune.data import split
from embedtune.data.clean import text_hash
from embedtune.data.columns import parse_columns
from embedtune.data.read import Counts, Row, read_texts, stored_bytes
from embedtune.data.spool import CHUNK, LazyTokens, Spool, open_spool, spool
from embedtune.data.tokens import Chunker, Tokens, numbered, tokenize
from embedtune.encoder import load
from embedtune.encoder.load import Loaded
from embedtune.errors import UserError
from embedtune.fit import past, ranks
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import name_of, token_profile, tokenised, written
from embedtune.recipes import MLM

# Text that is tokenised before training: on two cores that takes about a minute.
MOST_BYTES = 500_000_000
BARREN = "nothing in them that the tokenizer knows"
COUNTED = 1_000_000  # tokens counted at once
SAMPLE, SAMPLE_TOKENS = 20_000, 5_000_000  # lines that tell of all where these are tokenised on the fly; and at most
SOME = 256  # of them tokenised at once
NONE = np.zeros(0, np.int64)
DRAWN = 8  # what a key is for: which lines these are
SPLIT = "`embedtune data split` parts a text without them, then name its dev part with --dev"


@dataclass(frozen=True)
class Sample:
    """What some lines, drawn from all that are trained on, say of them."""

    lines: int
    barren: int  # of them give no row
    chunked: int  # and so many give several
    lengths: np.ndarray  # tokens of each row
    frequencies: np.ndarray  # (V,) how often each token stands in them


@dataclass(frozen=True)
class Text:
    """Text as token rows, and which of them are trained and scored on; `more` as `Sides` says it of all tasks."""

    counts: Counts
    dev_counts: Counts | None
    tokens: Tokens | LazyTokens
    dev: Tokens
    sides: split.Split
    old: int | None = None
    more: dict[str, str] = field(default_factory=dict)
    sample: Sample | None = None  # where it is tokenised on the fly

    def frequencies(self, size: int) -> np.ndarray:
        """(size,) how often each token stands in the training rows, or in a sample of them."""
        if not isinstance(self.tokens, Tokens):
            assert self.sample is not None
            return np.pad(self.sample.frequencies, (0, size))[:size]
        counts = np.zeros(size)
        for start in range(0, len(self.tokens.ids), COUNTED):
            counts += np.bincount(self.tokens.ids[start : start + COUNTED], minlength=size)
            self.tokens.let_go()
        for row in self.sides.dev if self.dev is self.tokens else ():
            counts -= np.bincount(self.tokens.row(row), minlength=size)
        return counts

    def profile(self) -> dict[str, Any]:
        """Rows and tokens for the data profile; what is estimated says from how many lines."""
        sizes = {"rows": len(self.tokens), "train_rows": len(self.sides.train), "dev_rows": len(self.sides.dev)}
        if isinstance(self.tokens, Tokens):
            return {**sizes, "chunked_lines": self.tokens.chunked, **token_profile(self.tokens.spread())}
        assert self.sample is not None
        found = {"chunked_lines": self.sample.chunked, **token_profile(np.bincount(self.sample.lengths))}
        for name in ("chunked_lines", "tokens"):
            found[name] = self._all(found[name])
        return {**sizes, **found, "tokens_estimated_from_lines": self.sample.lines}

    def remarks(self, max_length: int) -> list[str]:
        """What of the text gives no row, and what gives several."""
        if isinstance(self.tokens, Tokens):
            lost = self.counts.used - self.tokens.lines if self.old is None else 0  # else said already
            said = {f"{lost:,} rows left out: {BARREN}": lost,
                    f"{self.tokens.chunked:,} rows longer than {max_length} tokens were chunked, none cut":
                    self.tokens.chunked}  # fmt: skip
            return [line for line, count in said.items() if count]
        assert self.sample is not None
        barren, chunked = self._all(self.sample.barren), self._all(self.sample.chunked)
        said = {f"about {barren:,} lines left out when they are met: {BARREN}": barren,
                f"about {chunked:,} lines are longer than {max_length} tokens: chunked, none cut": chunked}  # fmt: skip
        return [
            "lines are tokenised on the fly, when a batch takes them (docs/speed.md): a batch counts lines, and counts "
            f"of tokens and chunks are estimates from {self.sample.lines:,} of them",
            *(line for line, count in said.items() if count),
        ]

    def _all(self, some: int) -> int:
        """What was counted in the sample, for all training lines."""
        assert self.sample is not None
        return round(some * len(self.sides.train) / self.sample.lines)


def on_the_fly(recipe: MLM) -> bool:
    """Whether lines are tokenised when a batch takes them: where asked for, or where the text is large.

    A run that goes on from another holds both texts in memory anyway.
    """
    if recipe.on_the_fly is not None or recipe.past.continue_from is not None:
        return bool(recipe.on_the_fly)
    return stored_bytes(recipe.train) > MOST_BYTES


def row_length(recipe: MLM, loaded: Loaded) -> int:
    """Tokens of a row: what the recipe says, or else the model; a UserError beyond its positions."""
    most = loaded.model.config.max_position_embeddings - loaded.offset
    if recipe.max_length is not None and recipe.max_length > most:
        raise UserError(
            f"{recipe.max_length} tokens are more than the {most} positions of the model", where="--max-length"
        )
    return recipe.max_length or loaded.max_length


def read(recipe: MLM, loaded: Loaded, home: Path, remarks: list[str]) -> Text:
    """The text that a recipe names, parted; with the run before, where it goes on from one."""
    if recipe.past.continue_from:
        return _both_runs(recipe, loaded, home, remarks)
    return _read(recipe, loaded, home, remarks)


def _read(recipe: MLM, loaded: Loaded, home: Path, remarks: list[str]) -> Text:
    if recipe.on_the_fly:
        return _read_lines(recipe, loaded, home, remarks)
    counts, tokens = _tokens(recipe.train, recipe, loaded, home / "train")
    if recipe.dev is None:
        return Text(counts, None, tokens, tokens, _held_out(tokens, recipe, remarks))
    dev_counts, dev = _tokens(recipe.dev, recipe, loaded, home / "dev")
    return Text(counts, dev_counts, tokens, dev, _given_dev(tokens, dev, recipe.dev_rows, remarks))


def _rows(data: Any, recipe: MLM, counts: Counts | None = None) -> Iterator[Row]:
    return read_texts(data, columns=parse_columns(recipe.columns), bad_rows=recipe.bad_rows, counts=counts)


def _tokens(data: Any, recipe: MLM, loaded: Loaded, folder: Path) -> tuple[Counts, Tokens]:
    counts = Counts()
    rows = _rows(data, recipe, counts)
    tokens = tokenised(tokenize, rows, loaded.tokenizer, row_length(recipe, loaded), folder)
    if not len(tokens):
        raise _nothing(data)
    return counts, tokens


def _nothing(data: Any) -> UserError:
    return UserError("has no text that the tokenizer turns into tokens", where=name_of(data))


def _read_lines(recipe: MLM, loaded: Loaded, home: Path, remarks: list[str]) -> Text:
    """The text as lines that are tokenised on the fly; what is scored on is tokenised now."""
    counts, folder, chunker = Counts(), home / "lines", Chunker.of(loaded.tokenizer, row_length(recipe, loaded))
    rows = _rows(recipe.train, recipe, counts)
    lines = written(lambda: spool(rows, folder), rows, lambda: open_spool(folder))
    if recipe.dev is None:
        dev_counts, (dev, held) = None, _held_lines(lines, recipe, loaded, home / "dev", remarks)
        sides = split.Split(split.AllBut(len(lines), held), np.arange(len(dev)), 0)
    else:
        dev_counts, dev = _tokens(recipe.dev, recipe, loaded, home / "dev")
        sides = _given_dev_lines(lines, dev, recipe, remarks)
    tokens = LazyTokens(lines, chunker)
    sample = _sample(tokens, sides.train, recipe.loop.seed)
    if not len(sample.lengths):
        raise _nothing(recipe.train)
    return Text(counts, dev_counts, tokens, dev, sides, more={"tokenised": "on the fly"}, sample=sample)


def _held_lines(
    lines: Spool, recipe: MLM, loaded: Loaded, folder: Path, remarks: list[str]
) -> tuple[Tokens, np.ndarray]:
    """Lines that are held out, as token rows that know their documents, and by their numbers."""
    found = ranks.first(lambda: split.hold_out_lines(lines, recipe.dev_rows, recipe.loop.seed))
    held = np.array(found["held"], np.int64)
    rows = (Row({"text": text}, "", number, number) for number, text in enumerate(lines.texts(held)))
    dev = tokenised(tokenize, rows, loaded.tokenizer, row_length(recipe, loaded), folder)
    if not len(dev):
        raise _nothing(recipe.train)
    remarks.append(
        f"held out {len(held):,} of {len(lines):,} lines, in whole documents or runs of neighbouring lines; "
        f"{found['moved']:,} that stand in training lines word for word went back. Near-duplicates were not looked "
        f"for, and flatter the scores where there are any: {SPLIT}"
    )
    places = lines.places(held)[dev.document]
    return dataclasses.replace(dev, document=places[:, 0], line=places[:, 1]), held


def _given_dev_lines(lines: Spool, dev: Tokens, recipe: MLM, remarks: list[str]) -> split.Split:
    some = _first(dev, recipe.dev_rows, remarks)
    scored = _lines_of(dev, some)

    def leaked() -> int:
        texts = [_line(row) for row, place in numbered(_rows(recipe.dev, recipe)) if place in scored]
        known = {text for _, text in lines.having(set(texts))}
        return sum(text in known for text in texts)

    count = ranks.first(leaked)
    found = f"{count:,} of {len(scored):,} dev lines also stand in the training text word for word" if count else ""
    remarks.append(f"{found + ': their scores flatter. ' if found else ''}Near-duplicates of dev rows in the training "
                   f"text were not looked for: {SPLIT}")  # fmt: skip
    return split.Split(split.AllBut(len(lines), NONE), some, 0)


def _sample(tokens: LazyTokens, train: split.AllBut, seed: int) -> Sample:
    """Some of the training lines, the same for all processes, and not more than SAMPLE_TOKENS of text by much."""
    lines = barren = chunked = 0
    lengths: list[int] = []
    frequencies = np.zeros(len(tokens.chunker.barren))
    drawn = keyed.permutation(np.arange(min(SAMPLE, len(train))), len(train), seed, DRAWN)
    for at in range(0, len(drawn), SOME):
        some = train[drawn[at : at + SOME]]
        rows, ids = tokens.rows(some)
        lines += len(some)
        barren += len(some) - int((ids < CHUNK).sum())
        chunked += int((ids // CHUNK == 1).sum())
        lengths += map(len, rows)
        frequencies += np.bincount(np.concatenate([*rows, NONE]), minlength=len(frequencies))
        if sum(lengths) > SAMPLE_TOKENS:
            break
    return Sample(lines, barren, chunked, np.array(lengths, np.int64), frequencies)


def _both_runs(recipe: MLM, loaded: Loaded, home: Path, remarks: list[str]) -> Text:
    """The new text with a sample of the old, as rows of their own, and the dev rows of both.

    Lines are what is drawn and left out, so both texts pass through memory.
    """

    def own(each: MLM, folder: Path | None) -> Sides:
        """A line with a held-out chunk is held out whole."""
        opened = loaded if folder is None else load.load_mlm(folder, each.loop.seed)
        said: list[str] = []
        place = home / (f"run-{text_hash(str(folder.resolve())):x}" if folder else "new")
        text = _read(each, opened, place, said)
        held = _lines_of(text.dev, text.sides.dev)
        dev = [row for row, line in numbered(_rows(each.train if each.dev is None else each.dev, each)) if line in held]
        train = [row for row, line in numbered(_rows(each.train, each)) if each.dev is not None or line not in held]
        return Sides(train, dev, text.counts, text.dev_counts, said)

    both = past.sides(recipe, own, Known(key=_line, held=_line, join=_joined))
    remarks += both.remarks
    train, dev = (
        tokenised(tokenize, rows, loaded.tokenizer, row_length(recipe, loaded), home / name)
        for name, rows in (("train", both.train), ("dev", both.dev))
    )
    if lost := len(both.train) + len(both.dev) - train.lines - dev.lines:
        remarks.append(f"{lost:,} rows left out: {BARREN}")
    whole = split.Split(split.AllBut(len(train), NONE), np.arange(len(dev)), 0)
    documents = {row.document for row in both.dev[: both.old]}
    old = int(np.isin(dev.document, list(documents)).sum())
    return Text(both.counts, both.dev_counts, train, dev, whole, old, both.identity())


def _line(row: Row) -> str:
    return str(row.values["text"])


def _lines_of(tokens: Tokens, rows: np.ndarray) -> set[tuple[int, int]]:
    """(document, line) of these token rows."""
    return set(zip(tokens.document[rows].tolist(), tokens.line[rows].tolist()))


def _joined(old: list[Row], new: list[Row]) -> list[Row]:
    """The rows of both, with other documents."""
    first = max((row.document for row in old), default=-1) + 1
    return [*old, *(row._replace(document=first + row.document) for row in new)]


def _held_out(tokens: Tokens, recipe: MLM, remarks: list[str]) -> split.Split:
    sides = split.hold_out(tokens, recipe.dev_rows, recipe.loop.seed)
    remarks.append(
        f"held out {len(sides.dev):,} of {len(tokens):,} rows, in whole documents or runs of neighbouring lines; "
        f"{sides.moved:,} near-duplicates of training rows went back"
    )
    return sides


def _given_dev(tokens: Tokens, dev_tokens: Tokens, most: int, remarks: list[str]) -> split.Split:
    train, dev = split.AllBut(len(tokens), NONE), _first(dev_tokens, most, remarks)
    if leaked := len(split.also_in(tokens, train, dev, dev_tokens)):
        remarks.append(f"{leaked:,} of {len(dev):,} dev rows also stand in the training text: their scores flatter")
    return split.Split(train, dev, 0)


def _first(dev_tokens: Tokens, most: int, remarks: list[str]) -> np.ndarray:
    """The rows of a given dev text that are scored on."""
    dev = np.arange(len(dev_tokens))[:most]
    if len(dev_tokens) > len(dev):
        remarks.append(f"scored on the first {len(dev):,} of {len(dev_tokens):,} dev rows (--dev-rows)")
    return dev
