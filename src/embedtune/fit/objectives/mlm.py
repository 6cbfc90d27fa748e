"""Masked language modelling (arXiv 1810.04805): masks are a function of (seed, epoch, row); fixed ones to score.

The stock head runs on the masked positions only: a hook on the backbone hands it those rows, so a head of any
architecture does a seventh of the work, packed or padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune import keyed
from embedtune.data.split import RUN, AllBut
from embedtune.data.spool import LazyTokens
from embedtune.data.tokens import Tokens
from embedtune.encoder import load
from embedtune.encoder.heads import only_rows
from embedtune.encoder.load import Loaded
from embedtune.encoder.vocabulary import continuations
from embedtune.fit import order, ranks
from embedtune.fit.batches import micro_batches
from embedtune.fit.dropout import KeyedNoise
from embedtune.fit.engine import Step, unread
from embedtune.fit.losses import weighted_cross_entropy

SCORE_RATE = 0.15  # whatever the training rate, so that scores of different recipes compare
SCORE_TOKENS = 4096  # a forward pass when scoring
SCORE_SEED = 15  # fixed masks: every scoring of every run sees the same ones
CHOOSE, ACTION, REPLACE = 1, 2, 3  # what a mask's random number decides


@dataclass(frozen=True)
class Masker:
    """What masking needs to know of a tokenizer."""

    mask_id: int
    vocabulary: np.ndarray  # ids that may stand in as random replacements
    special: np.ndarray  # (V,) bool
    continues: np.ndarray | None  # (V,) bool: the token continues a word; None masks single tokens

    @classmethod
    def of(cls, tokenizer: Any, whole_words: bool) -> Masker:
        """Read the tables off a tokenizer."""
        size = len(tokenizer)
        special = np.zeros(size, bool)
        special[[number for number in tokenizer.all_special_ids if number < size]] = True
        pieces = tokenizer.convert_ids_to_tokens(range(size)) if whole_words else []
        return cls(
            tokenizer.mask_token_id, np.flatnonzero(~special), special, continuations(pieces) if whole_words else None
        )

    def mask(self, rows: list[np.ndarray], ids: np.ndarray, rate: float, seed: int, epoch: int) -> Masked:
        """Mask token rows; `ids` ((n,) row numbers) key the noise. Each row has at least one masked token.

        Of the chosen tokens 80 % become the mask token, 10 % a random token, 10 % stay.
        """
        tokens = np.concatenate(rows).astype(np.int64)
        lengths = np.array([len(row) for row in rows])
        ends = np.cumsum(lengths)
        owner = np.repeat(np.arange(len(rows)), lengths)
        position = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
        maskable = ~self.special[tokens]
        unit = self._units(tokens, position)
        score = keyed.uniform(keyed.key(seed, epoch, CHOOSE, ids[owner], unit))
        score[~maskable] = np.inf
        # The lowest score of a row is always taken, so that a short row teaches (and scores) something.
        lowest = np.minimum.reduceat(score, ends - lengths)[owner]
        chosen = np.flatnonzero((score < rate) | ((score == lowest) & maskable))
        action = keyed.uniform(keyed.key(seed, epoch, ACTION, ids[owner[chosen]], position[chosen]))
        random = keyed.key(seed, epoch, REPLACE, ids[owner[chosen]], position[chosen]) % np.uint64(len(self.vocabulary))
        masked = tokens.copy()
        masked[chosen] = np.where(
            action < 0.8, self.mask_id, np.where(action < 0.9, self.vocabulary[random.astype(np.int64)], tokens[chosen])
        )
        return Masked(np.split(masked, ends[:-1]), owner[chosen], position[chosen], tokens[chosen])

    def _units(self, tokens: np.ndarray, position: np.ndarray) -> np.ndarray:
        """What is masked as one: the position itself, or the position where its word starts."""
        if self.continues is None:
            return position
        starts = ~self.continues[tokens] | (position == 0) | self.special[tokens]
        first = np.maximum.accumulate(np.where(starts, np.arange(len(tokens)), 0))
        return position[first]


@dataclass(frozen=True)
class Masked:
    """Masked token rows, and for every chosen token its row, its position there and the id to be guessed."""

    rows: list[np.ndarray]
    owner: np.ndarray
    position: np.ndarray
    labels: np.ndarray


@dataclass
class MaskedLanguageModel:
    """The objective: rows of `tokens` named by `train` to learn from, rows of `dev_tokens` named by `dev` to score."""

    loaded: Loaded
    tokens: Tokens | LazyTokens
    train: AllBut
    dev_tokens: Tokens
    dev: np.ndarray
    rate: float
    seed: int
    head_steps: int
    noise: KeyedNoise
    masker: Masker
    head: list[str] = field(default_factory=list)
    most_tokens: int | None = None
    _ready: tuple[tuple, Masked, np.ndarray] | None = None  # of which step, its masked rows, what keys their noise
    row_losses: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 2))
    )  # (dev rows, 2): loss, tokens; last scoring

    @property
    def model(self) -> Any:
        """The stock model that is trained."""
        return self.loaded.model

    @property
    def size(self) -> int:
        """Training rows; lines, where these are tokenised on the fly."""
        return len(self.train)

    @property
    def body(self) -> Any:
        """What may compute in bf16: all of it."""
        return self.loaded.model

    def rows(self, step: int, batch: int, seed: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of a step: every row once an epoch."""
        return order.batch_rows(step, batch, self.size, seed)

    @property
    def measures(self) -> list[str]:
        """Names of what `score` gives."""
        return ["dev_loss", "dev_perplexity", "dev_accuracy", "dev_loss_per_character"]

    def dev_groups(self) -> np.ndarray:
        """(dev rows,) int64: rows of one document, or of one run of its lines, share a number."""
        tokens, dev = self.dev_tokens, self.dev
        places = np.stack([tokens.document[dev], tokens.line[dev] // RUN])
        return np.unique(places, axis=1, return_inverse=True)[1].reshape(-1)

    def step(self, step: int, epoch: int, rows: np.ndarray, max_tokens: int) -> Step:
        """Gradients of the mean loss over the masked tokens of every N-th of `rows`, whatever the micro-batches."""
        if self._ready is None or self._ready[0] != (step, epoch, rows.tobytes()):
            self.ahead(step, epoch, rows)
        assert self._ready is not None
        _, masked, ids = self._ready
        if not masked.rows:
            return Step(0.0, 0, 0.0)
        self._freeze_body(step < self.head_steps)
        self.model.train()
        losses = []
        for first, last in micro_batches([len(row) for row in masked.rows], max_tokens, self.loaded.padded is not None):
            position = np.concatenate([np.arange(len(row)) for row in masked.rows[first:last]])
            sample = np.repeat(ids[first:last], [len(row) for row in masked.rows[first:last]])
            logits, labels = self._logits(masked, first, last, (step, sample, position))
            # Rows of unknown characters alone have nothing to guess, and a batch may hold no others.
            part = weighted_cross_entropy(logits, labels, 1 / max(1, len(masked.labels)))
            part.backward()
            losses.append(part.detach())
        return Step(unread(torch.stack(losses).double().sum()), sum(map(len, masked.rows)), len(masked.labels))

    def ahead(self, step: int, epoch: int, rows: np.ndarray) -> None:
        """Take and mask every N-th of `rows`, by length, for a step that is still to come."""
        rank, count = ranks.world()
        numbers = self.train[rows]
        numbers = numbers[np.argsort(self.tokens.lengths_of(numbers), kind="stable")][rank::count]
        found, ids = self.tokens.rows(numbers)
        masked = self.masker.mask(found, ids, self.rate, self.seed, epoch) if found else Masked([], ids, ids, ids)
        self._ready = (step, epoch, rows.tobytes()), masked, ids

    def _freeze_body(self, frozen: bool) -> None:
        """Without gradients below it, a fresh head trains alone at the price of a forward pass."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not frozen or name in self.head)

    def _logits(self, masked: Masked, first: int, last: int, noise: tuple | None) -> tuple[Tensor, Tensor]:
        """Logits (masked tokens of rows first..last, V) and the ids they should name."""
        inputs = self.loaded.collate(masked.rows[first:last])
        device = inputs["input_ids"].device
        mine = slice(*np.searchsorted(masked.owner, [first, last]))
        owner, position = masked.owner[mine] - first, masked.position[mine]
        if self.loaded.padded is None:
            lengths = np.array([len(row) for row in masked.rows[first:last]])
            flat = (np.cumsum(lengths) - lengths)[owner] + position
        else:
            flat = owner * inputs["input_ids"].shape[1] + position
        if noise is not None:
            self._key_noise(noise, inputs, masked.rows[first:last])
        index = torch.from_numpy(flat).to(device)
        with only_rows(self.model.base_model, index):
            logits = self.model(**inputs).logits
        return logits.reshape(len(flat), logits.shape[-1]), torch.from_numpy(masked.labels[mine]).to(device)

    def _key_noise(self, noise: tuple, inputs: dict[str, Any], rows: list[np.ndarray]) -> None:
        step, sample, position = noise
        if self.loaded.padded is not None:
            shape = inputs["input_ids"].shape
            real = np.arange(shape[1]) < np.array([len(row) for row in rows])[:, None]
            grid = np.zeros((2, *shape), np.int64)
            grid[:, real] = sample, position
            sample, position = grid
        self.noise.set(step, sample, position, inputs["input_ids"].device)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Loss per masked token, pseudo-perplexity (its exponential), masked-token accuracy, loss per character.

        Always 15 % with the same masks. Loss per character spreads the loss per token over the characters of the
        text, so that models with different vocabularies compare.
        """
        self.model.eval()
        places = np.argsort(self.dev_tokens.lengths_of(self.dev), kind="stable")
        numbers = self.dev[places]
        masked = self.masker.mask([self.dev_tokens.row(n) for n in numbers], numbers, SCORE_RATE, SCORE_SEED, 0)
        sums, right, at = np.zeros((len(numbers), 2)), 0, 0
        for first, last in micro_batches(
            [len(row) for row in masked.rows], SCORE_TOKENS, self.loaded.padded is not None
        ):
            logits, labels = self._logits(masked, first, last, None)
            logits = logits.float()  # also for argmax, which takes six times as long in bf16
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            right += int((logits.argmax(-1) == labels).sum())
            rows = places[masked.owner[at : at + len(labels)]]
            np.add.at(sums, rows, np.stack([losses.cpu().double().numpy(), np.ones(len(labels))], axis=1))
            at += len(labels)
        self.row_losses = sums
        loss = float(sums[:, 0].sum() / sums[:, 1].sum())
        lengths, characters = self.dev_tokens.lengths_of(self.dev), self.dev_tokens.characters[self.dev]
        tokens = int(lengths.sum()) - self.dev_tokens.affix * len(self.dev)
        return {
            "dev_loss": loss,
            "dev_perplexity": float(np.exp(min(loss, 700))),
            "dev_accuracy": right / float(sums[:, 1].sum()),
            "dev_loss_per_character": loss * tokens / max(1, int(characters.sum())),
        }

    def save(self, folder: Path) -> None:
        """Write the standard folder."""
        load.save(self.loaded, folder)
