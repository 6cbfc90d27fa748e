"""Dropout whose masks are a function of (seed, step, sample, position): no generator state, no replay.

A table of random masks is drawn once from the seed. For every token and every dropout layer a hash of the key picks
a row of the table, so a mask costs one gather. Micro-batches, ranks, resumed runs and a second forward pass of the
same rows see the same masks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from embedtune import keyed
from embedtune.encoder import rounded

TABLE_ROWS = 4096


class KeyedNoise:
    """What the dropout layers of one model share: the tables, and the keys of the tokens now in the model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: Tensor | None = None
        self._tables: dict[tuple, Tensor] = {}

    def set(self, step: int, samples: np.ndarray, positions: np.ndarray, device: torch.device | str = "cpu") -> None:
        """Name the tokens of the next forward pass: (n,) sample ids and positions, packed or padded in any shape."""
        keys = (keyed.key(self.seed, step, samples, positions) >> np.uint64(1)).astype(np.int64).reshape(-1)
        # Where an encoder computes rows beyond the tokens (rounded.py), these have keys too.
        keys = np.pad(keys, (0, rounded.beyond(len(keys), torch.device(device))))
        self.keys = torch.from_numpy(keys).to(device)

    def salt(self, layer: int) -> Tensor:
        """What the keys are mixed with in a layer, () int64."""
        return torch.tensor(int(keyed.key(self.seed, layer)[0] >> np.uint64(1)) | 1)

    def mask(self, salt: Tensor, table: Tensor, like: Tensor) -> Tensor:
        """Mask of the shape of `like` (..., D): a row of `table` for each of its rows."""
        if self.keys is None:
            raise RuntimeError("KeyedNoise.set was not called before the forward pass")
        keys = self.keys[: like.numel() // like.shape[-1]]
        return table.index_select(0, ((keys ^ salt) * salt >> 20) & (TABLE_ROWS - 1)).view(like.shape)

    def table(self, rate: float, like: Tensor) -> Tensor:
        """(TABLE_ROWS, D) masks for a `like` (..., D): 0 with probability `rate`, else 1 / (1 - rate)."""
        name = (rate, like.shape[-1], like.dtype, like.device)
        if name not in self._tables:
            cells = keyed.key(self.seed, like.shape[-1], np.arange(TABLE_ROWS * like.shape[-1]))
            kept = torch.from_numpy(keyed.uniform(cells) >= rate).view(TABLE_ROWS, -1)
            self._tables[name] = (kept.to(torch.float64) / (1 - rate)).to(like.dtype).to(like.device)
        return self._tables[name]


class KeyedDropout(nn.Module):
    """Stands in for nn.Dropout in a stock model."""

    salt: Tensor

    def __init__(self, rate: float, layer: int, noise: KeyedNoise) -> None:
        super().__init__()
        self.p, self.noise = rate, noise
        # Tensors, not numbers, so that compiled layers are one piece of code, whichever layer it is.
        self.register_buffer("salt", noise.salt(layer), persistent=False)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) with entries dropped in training; unchanged otherwise."""
        if not self.training or self.p == 0:
            return x
        table = self.table
        if table is None or table.dtype != x.dtype or table.device != x.device or table.shape[1] != x.shape[-1]:
            table = self.table = self.noise.table(self.p, x)
        return x * self.noise.mask(self.salt, table, x)


def key_dropout(model: nn.Module, noise: KeyedNoise) -> int:
    """Replace every nn.Dropout of `model` in place; returns how many drop anything."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout)
    ]
    for layer, (parent, name, child) in enumerate(places):
        setattr(parent, name, KeyedDropout(child.p, layer, noise))
    return sum(child.p > 0 for _, _, child in places)
