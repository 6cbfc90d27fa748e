"""The objective of everything that is learned through vectors: pairs with negatives, and scored pairs.

A step embeds each distinct text of its batch once. Where they fit the token budget one forward pass is kept for the
backward pass; else vectors come first, without a graph, then their gradients, then a second forward pass per
micro-batch carries these into the weights (GradCache, arXiv 2101.06983). Dropout is keyed, so both passes see the
same noise, and the batch may be as large as the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune.data.tokens import Tokens
from embedtune.encoder import embedder, varlen
from embedtune.fit import ranks
from embedtune.fit.batches import micro_batches
from embedtune.fit.dropout import KeyedNoise
from embedtune.fit.engine import Step, unread

SCORE_TOKENS = 8192  # a forward pass when scoring
CACHED_SHARE = 8  # micro-batches of the gradient cache hold this share of the token budget
NONE = -1  # a row that has fewer negatives than others


@dataclass
class EmbeddingObjective:
    """Rows of `columns` (texts as row numbers of `tokens`) to learn from, through `loss`."""

    model: Any  # a stock SentenceTransformer, padding-free in place
    tokens: Tokens
    columns: np.ndarray  # (n, c) int64; NONE where a row has no text in that column
    # From vectors (U, D) of distinct texts, the place of each cell's text among them (m, c), NONE where there is
    # none, and the numbers of the batch's rows (m,) to the batch's mean loss.
    loss: Callable[[Tensor, np.ndarray, np.ndarray], Tensor]
    order: Callable[[int], tuple[int, np.ndarray]]
    noise: KeyedNoise
    measures: list[str]
    padded: str | None = None
    prompt_lengths: np.ndarray | None = None  # (rows of tokens,), only where pooling leaves prompts out
    config_values: dict[str, Any] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)
    head_steps: int = 0
    most_tokens: int | None = None
    longer: Tokens | None = None  # the same texts as the saved model reads them, where training reads less of each
    _gathered: tuple[int, Tensor] | None = None  # of several processes: the step, and the vectors of all

    @property
    def size(self) -> int:
        """Training rows."""
        return len(self.columns)

    @property
    def body(self) -> torch.nn.Module:
        """What may compute in bf16: the encoder, not what follows it."""
        module: torch.nn.Module = self.model[0]
        return module

    def rows(self, step: int, batch: int, seed: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of a step."""
        return self.order(step)

    def step(self, step: int, epoch: int, rows: np.ndarray, max_tokens: int) -> Step:
        """Gradients of the batch's loss on the parameters, whatever the micro-batches and processes."""
        cells = self.columns[rows]
        texts, place = np.unique(cells[cells != NONE], return_inverse=True)
        # Similar lengths lie side by side: in micro-batches, and in the blocks of the attention.
        by_length = np.argsort(self.tokens.lengths_of(texts), kind="stable")
        texts = texts[by_length]
        where = np.full(cells.shape, NONE)
        where[cells != NONE] = np.argsort(by_length)[place]
        rank, count = ranks.world()
        mine = texts[rank::count]
        self.model.train()
        parts = self._parts(self.tokens, mine, max_tokens)
        if len(parts) > 1:
            # A second forward pass has to be paid anyway: micro-batches may as well be small, and memory with them.
            parts = self._parts(self.tokens, mine, max_tokens // CACHED_SHARE)
        whole, kept = self._all_vectors(parts, step, len(texts))
        whole = whole.detach().requires_grad_()
        loss = self.loss(whole, where, rows)
        loss.backward()
        assert whole.grad is not None
        gradients = whole.grad[rank::count] * count  # for the mean over all processes, which is to be the sum
        if kept is not None:
            kept.backward(gradients)
        else:
            shares = gradients.split([len(part) for part in parts])
            # The longest first: their arrays are the largest, and what is freed of them holds all later ones.
            for part, gradient in zip(parts[::-1], shares[::-1], strict=True):
                self._embed(self.tokens, part, step).backward(gradient)
        return Step(unread(loss.detach()), int(self.tokens.lengths_of(mine).sum()))

    def _all_vectors(self, parts: list[np.ndarray], step: int, total: int) -> tuple[Tensor, Tensor | None]:
        """The vectors (total, D) of the batch, gathered from all processes, and this one's with their graph.

        The graph is kept only where this process has one part. A step that is tried again because memory ran out after
        the vectors were gathered takes them as they were: the other processes will not gather twice.
        """
        if self._gathered is not None and self._gathered[0] == step:
            return self._gathered[1], None
        kept: Tensor | None = None
        if len(parts) == 1:
            kept = self._embed(self.tokens, parts[0], step)
            vectors = kept.detach()
        elif parts:
            with torch.no_grad():
                vectors = torch.cat([self._embed(self.tokens, part, step) for part in parts[::-1]][::-1])
        else:  # fewer texts than processes
            dimension, device = self.model.get_embedding_dimension(), next(self.model.parameters()).device
            vectors = torch.zeros(0, int(dimension), device=device)
        whole = ranks.gather(vectors, total)
        if ranks.world()[1] > 1:
            self._gathered = step, whole
        return whole, kept

    def _parts(self, tokens: Tokens, texts: np.ndarray, max_tokens: int) -> list[np.ndarray]:
        """Micro-batches of `texts`; where prompts are left out of pooling, all of one have the same prompt length."""
        parts, lengths = [], tokens.lengths_of(texts)
        for first, last in micro_batches(lengths, max_tokens, self.padded is not None):
            edges = [first, last]
            if self.prompt_lengths is not None:
                change = np.flatnonzero(np.diff(self.prompt_lengths[texts[first:last]])) + 1 + first
                edges = [first, *change.tolist(), last]
            parts += [texts[a:b] for a, b in zip(edges, edges[1:])]
        return parts

    def _embed(self, tokens: Tokens, texts: np.ndarray, step: int | None) -> Tensor:
        """Vectors (m, D) float32 of token rows; `step` keys the dropout, None where the model is in eval mode."""
        rows = [tokens.row(number) for number in texts]
        device = next(self.model.parameters()).device
        if self.padded is None:
            features = varlen.pack(rows, varlen.position_offset(self.body), device)
        else:
            features = varlen.pad(rows, self.model.tokenizer.pad_token_id or 0, device)
        if step is not None:
            longest = max(map(len, rows))
            if self.padded is None:
                position = np.concatenate([np.arange(len(row)) for row in rows])
                sample = np.repeat(texts, [len(row) for row in rows])
            else:
                position = np.tile(np.arange(longest), (len(rows), 1))
                sample = np.repeat(texts[:, None], longest, 1)
            self.noise.set(step, sample, position, device)
        if self.prompt_lengths is not None:
            features["prompt_length"] = int(self.prompt_lengths[texts[0]])
        encoder, *rest = self.model
        features = encoder(features)
        # Pooling, projection and similarity in float32, whatever the encoder computes in.
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in rest:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors

    @torch.no_grad()
    def vectors(self, texts: np.ndarray) -> np.ndarray:
        """Vectors (m, D) float32 of token rows `texts` (m,), as the saved model would give them."""
        self.model.eval()
        tokens = self.longer or self.tokens
        by_length = np.argsort(tokens.lengths_of(texts), kind="stable")
        found = [self._embed(tokens, part, None) for part in self._parts(tokens, texts[by_length], SCORE_TOKENS)]
        out = torch.cat(found).cpu().numpy() if found else np.zeros((0, 0), np.float32)
        return out[np.argsort(by_length)]

    def trained_texts(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Token rows (m,) that training reads, spread over all where they are more than `most`, and their tokens."""
        texts = np.unique(self.columns[self.columns != NONE])
        texts = texts[np.linspace(0, len(texts) - 1, min(most, len(texts))).astype(int)]
        return texts, (self.longer or self.tokens).lengths_of(texts)

    def save(self, folder: Path) -> None:
        """Write the standard folder."""
        embedder.save_embedder(self.model, folder, self.config_values)
