"""Texts of pairs to token rows: every distinct text of a role once, behind that role's prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedtune.data.read import Row
from embedtune.data.tokens import Tokens, tokenize
from embedtune.encoder import load
from embedtune.encoder.embedder import Trainable
from embedtune.errors import UserError
from embedtune.fit.prepared import tokenised

ANCHOR, DOCUMENT = "query", "document"


@dataclass
class Texts:
    """The distinct texts of a run; a text's number is its row in the token file."""

    numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def number(self, role: str, text: str) -> int:
        """The number of a text in a role, a new one where it has none."""
        return self.numbers.setdefault((role, text), len(self.numbers))

    def same(self, role: str, other: str) -> dict[int, int]:
        """For texts of `role` that also stand in the role `other`: their number there."""
        return {
            n: self.numbers[other, t] for (r, t), n in self.numbers.items() if r == role and (other, t) in self.numbers
        }

    def tokenize(self, tokenizer: Any, prompts: dict[str, str], max_length: int, folder: Path) -> Tokens:
        """One token row a text, in the order of the numbers; long ones are cut, and counted in `chunked`."""

        def rows() -> Iterator[Row]:
            for (role, text), number in self.numbers.items():
                yield Row({"text": prompts[role] + text}, "", number + 1, number)

        return tokenised(tokenize, rows(), tokenizer, max_length, folder, cut=True)

    def prompt_lengths(self, opened: Trainable, prompts: dict[str, str]) -> np.ndarray | None:
        """Tokens of each text's prompt (special one before it included), only where pooling leaves prompts out."""
        if all(getattr(module, "include_prompt", True) for module in opened.model) or not any(prompts.values()):
            return None
        # As sentence-transformers counts it: the prompt tokenised alone, without the special token at its end.
        lengths = {r: len(opened.model.tokenizer(p)["input_ids"]) - 1 if p else 0 for r, p in prompts.items()}
        return np.array([lengths[role] for role, _ in self.numbers])


def row_length(opened: Trainable, folder: Path, asked: int | None) -> int:
    """Tokens of a text that are read: `asked`, or what the model says; a UserError beyond its positions.

    The model keeps the number, so that the saved one reads as much as was trained and scored.
    """
    from embedtune.encoder import varlen

    backbone = opened.model[0].model
    most = backbone.config.max_position_embeddings - varlen.position_offset(backbone)
    if asked is not None and asked > most:
        raise UserError(f"{asked} tokens are more than the {most} positions of the model", where="--max-length")
    length = asked or min(load.stated_length(folder, opened.model.tokenizer), most)
    opened.model.max_seq_length = length
    return length


def set_prompts(model: Any, query: str | None, document: str | None) -> dict[str, str]:
    """The prompt of each role: the given one, which the model keeps, or the model's own."""
    from embedtune.encoder.encode import role_prompt

    for role, prompt in ((ANCHOR, query), (DOCUMENT, document)):
        if prompt is not None:
            model.prompts[role] = prompt
    return {ANCHOR: role_prompt(model, "query"), DOCUMENT: role_prompt(model, "document")}


def tokens_of(
    texts: Texts,
    tokenizer: Any,
    prompts: dict[str, str],
    lengths: tuple[int, int | None],
    home: Path,
    remarks: list[str],
) -> tuple[Tokens, Tokens]:
    """The texts as the saved model reads them, and as training does; `lengths` are max_length and train_length."""
    read, trained = lengths
    if trained is not None and trained > read:
        raise UserError(f"{trained} tokens are more than the {read} that the model reads", where="--train-length")
    longer = texts.tokenize(tokenizer, prompts, read, home / "data" / "texts")
    if longer.chunked:
        remarks.append(f"{longer.chunked:,} of {len(longer):,} texts are longer than {read} tokens: cut to them")
    if trained is None:
        return longer, longer
    tokens = texts.tokenize(tokenizer, prompts, trained, home / "data" / "shorter")
    remarks.append(
        f"training reads the first {trained} tokens of a text ({tokens.chunked:,} of {len(tokens):,} have more); "
        f"scoring and the saved model read {read}"
    )
    return longer, tokens
