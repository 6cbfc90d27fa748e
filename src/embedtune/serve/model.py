"""The model behind the server: texts or token ids in, vectors and token counts out, one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.encoder.embed import Rows, budget, embed_rows, tokenize
from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import LocalEncoder, Role, identity, is_local, open_encoder, role_prompt
from embedtune.errors import UserError
from embedtune.serve.batcher import Answer, BadIds, Given, NotFinite


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model: `compute` is what the batcher calls, in its one thread."""

    name: str
    sha256: str
    encoder: LocalEncoder
    precision: Precision
    batch_tokens: int

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return self.encoder.dimension

    @property
    def max_length(self) -> int:
        """Tokens of a text that the model reads."""
        return int(self.encoder.model.max_seq_length)

    @property
    def normalised(self) -> bool:
        """Whether its vectors have norm one, so that shortened ones are brought back to it."""
        return any(type(module).__name__ == "Normalize" for module in self.encoder.model)

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name."""
        return {name: text or "" for name, text in self.encoder.model.prompts.items()}

    def prompt(self, role: Role) -> str:
        """What stands before texts of a role."""
        return role_prompt(self.encoder.model, role)

    def compute(self, given: Sequence[Given]) -> list[Answer | Exception]:
        """An answer for each text, or what is wrong with it; its neighbours are not touched."""
        answers: list[Answer | Exception | None] = [self._wrong(each) for each in given]
        good = [number for number, wrong in enumerate(answers) if wrong is None]
        by_prompt: dict[str, list[int]] = {}
        for number in good:
            by_prompt.setdefault(given[number].prompt or "", []).append(number)
        for prompt, numbers in by_prompt.items():
            self._embed(given, numbers, prompt, answers)
        return [answer for answer in answers if answer is not None]

    def _embed(self, given: Sequence[Given], numbers: list[int], prompt: str, answers: list[Any]) -> None:
        """Put the answers of those that share a prompt in their places."""
        model: Any = self.encoder.model
        texts = [n for n in numbers if isinstance(given[n].content, str)]
        ids = [n for n in numbers if not isinstance(given[n].content, str)]
        rows = tokenize(model, [str(given[n].content) for n in texts], prompt) if texts else Rows([], np.zeros(0, bool))
        long = [len(given[n].content) > self.max_length for n in ids]
        rows = Rows([*rows.ids, *(np.array(given[n].content[: self.max_length], np.int64) for n in ids)],
                    np.concatenate([rows.cut, np.array(long, bool)]))  # fmt: skip
        found = embed_rows(model, rows, min(self.batch_tokens, budget(model.device)), prompt)
        finite = np.isfinite(found.vectors).all(axis=1)
        for place, number in enumerate([*texts, *ids]):
            answer = Answer(found.vectors[place], int(found.tokens[place]), bool(rows.cut[place]))
            answers[number] = answer if finite[place] else NotFinite("the model gave NaN or infinity for this text")

    def _wrong(self, given: Given) -> Exception | None:
        if isinstance(given.content, str):
            return None
        size = len(self.encoder.model.tokenizer)
        worst = max(given.content)
        return BadIds(f"token id {worst} is not among the {size:,} of the model") if worst >= size else None


def open_served(name: str, precision: Precision, batch_tokens: int) -> Served:
    """Load a model to be served. Raises UserError where there is none, or it is hosted elsewhere or an export."""
    if not is_local(name):
        raise UserError("is hosted elsewhere, or an export", where=name, fix="name a model folder or a hub name")
    encoder = open_encoder(name, precision=precision)
    assert isinstance(encoder, LocalEncoder)
    return Served(name, identity(name), encoder, precision, batch_tokens)
