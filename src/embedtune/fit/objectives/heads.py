"""The objective of every head: stock logits of rows or words, a loss on them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune.data.tokens import Tokens
from embedtune.encoder import heads
from embedtune.encoder.device import has_bf16
from embedtune.encoder.load import Loaded
from embedtune.fit import order, ranks
from embedtune.fit.batches import micro_batches
from embedtune.fit.dropout import KeyedNoise
from embedtune.fit.engine import Step, unread

SCORE_TOKENS = 8192  # a forward pass when scoring


@dataclass
class HeadObjective:
    """Token rows to learn from through a head: of whole rows, or of the tokens at `wanted` in each row."""

    loaded: Loaded
    tokens: Tokens
    train: np.ndarray  # (n,) row numbers of `tokens`
    # From logits (m, C) of rows (or of the wanted tokens of rows) and the numbers of these rows, to the sum of losses.
    loss: Callable[[Tensor, np.ndarray], Tensor]
    weight: Callable[[np.ndarray], float]  # what the sum over these rows is divided by: a mean over a whole batch
    noise: KeyedNoise
    measures: list[str]
    wanted: list[np.ndarray] | None = None  # places in each row that have a label; None where rows have
    frozen: bool = False
    head: list[str] = field(default_factory=list)
    head_steps: int = 0
    most_tokens: int | None = None

    @property
    def model(self) -> Any:
        """The stock model that is trained."""
        return self.loaded.model

    @property
    def body(self) -> Any:
        """What may compute in bf16: all of it."""
        return self.loaded.model

    @property
    def size(self) -> int:
        """Training rows."""
        return len(self.train)

    def rows(self, step: int, batch: int, seed: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of a step: every row once an epoch."""
        return order.batch_rows(step, batch, self.size, seed)

    def step(self, step: int, epoch: int, rows: np.ndarray, max_tokens: int) -> Step:
        """Gradients of the mean loss of every N-th of `rows`, whatever the micro-batches."""
        numbers = self.train[rows]
        lengths = self.tokens.lengths_of(numbers)
        numbers, lengths = (array[np.argsort(lengths, kind="stable")] for array in (numbers, lengths))
        self.model.train()
        if self.frozen:
            self.model.base_model.eval()
        rank, count = ranks.world()
        numbers, lengths = numbers[rank::count], lengths[rank::count]
        weight, losses = self.weight(numbers), []
        for first, last in micro_batches(lengths, max_tokens, self.loaded.padded is not None):
            some = numbers[first:last]
            part = self.loss(self.logits(some, step).float(), some) / weight
            part.backward()
            losses.append(part.detach())
        loss = unread(torch.stack(losses).double().sum()) if losses else 0.0  # fewer rows than processes
        return Step(loss, int(lengths.sum()), weight)

    def logits(self, numbers: np.ndarray, step: int | None) -> Tensor:
        """Logits of token rows (n, C), or of their wanted tokens end to end (m, C); `step` keys the dropout."""
        rows, types = self._inputs(numbers)
        device = self.model.device

        def key(owner: np.ndarray, position: np.ndarray) -> None:
            self.noise.set(step or 0, numbers[owner], position, device)

        named = None if step is None else key
        if self.wanted is None:
            return heads.row_logits(self.loaded, rows, types, named)
        starts = np.cumsum([len(row) for row in rows]) - [len(row) for row in rows]
        flat = np.concatenate([self.wanted[n] + start for n, start in zip(numbers, starts)]).astype(np.int64)
        return heads.token_logits(self.loaded, rows, flat, named)

    def _inputs(self, numbers: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Token ids of rows, and their token type ids where the model tells the texts of a pair apart by them."""
        rows = [self.tokens.row(number) for number in numbers]
        if self.tokens.types is None or not heads.tells_texts_apart(self.loaded):
            return rows, None
        return rows, [self.tokens.types_of(number) for number in numbers]

    def predict(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Logits of each token row: (C,), or (words, C) where words have labels; in the order of `numbers`."""

        def run(some: np.ndarray) -> list[np.ndarray]:
            logits = self.logits(some, None).float().cpu().numpy()
            return list(logits) if self.wanted is None else np.split(logits, self._ends(some))

        return self._in_order(numbers, run)

    def features(self, numbers: np.ndarray, layer: torch.nn.Module | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What a linear probe sees: the mean of each row's hidden states (n, D), or those of wanted tokens (m, D).

        And what `layer` of the head reads of each, (n, D) or (m, D); without a layer, the same again. In bf16 where
        the hardware has it: a probe asks for no more.
        """

        def run(some: np.ndarray) -> list[np.ndarray]:
            rows, types = self._inputs(some)
            if self.wanted is None:
                seen, states = heads.row_states(self.loaded, rows, types)
            else:
                lengths = [len(row) for row in rows]
                places = [self.wanted[n] + start for n, start in zip(some, np.cumsum(lengths) - lengths)]
                flat = torch.from_numpy(np.concatenate(places).astype(np.int64)).to(device)
                seen = states = heads.hidden_states(self.loaded, rows, types).index_select(0, flat)
            read = seen if layer is None else heads.read_by(self.loaded, layer, states[:, None])
            both = torch.stack([seen.float(), read.float()], 1).cpu().numpy()  # (n, 2, D)
            return list(both) if self.wanted is None else np.split(both, self._ends(some))

        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            found = self._in_order(numbers, run)
        both = np.stack(found) if self.wanted is None else np.concatenate(found)
        return both[:, 0], both[:, 1]

    def _ends(self, numbers: np.ndarray) -> np.ndarray:
        assert self.wanted is not None
        return np.cumsum([len(self.wanted[n]) for n in numbers])[:-1]

    @torch.no_grad()
    def _in_order(self, numbers: np.ndarray, run: Callable[[np.ndarray], list[np.ndarray]]) -> list[np.ndarray]:
        """What `run` gives for each token row, run on rows of like length, and put back into the order of `numbers`."""
        self.model.eval()
        by_length = np.argsort(self.tokens.lengths_of(numbers), kind="stable")
        lengths, found = self.tokens.lengths_of(numbers[by_length]), []
        for first, last in micro_batches(lengths, SCORE_TOKENS, self.loaded.padded is not None):
            found += run(numbers[by_length[first:last]])
        return [found[place] for place in np.argsort(by_length)]

    def save(self, folder: Path) -> None:
        """Write the standard folder."""
        heads.save_head(self.loaded, folder)
