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

TABLE_ROWS = 4096


class KeyedNoise:
    """What the dropout layers of one model share: the tables, and the keys of the tokens now in the model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: Tensor | None = None
        self._tables: dict[tuple, Tensor] = {}

    def set(self, step: int, samples: np.ndarray, positions: np.ndarray, device: torch.device | str = "cpu") -> None:
        """Name the tokens of the next forward pass: (n,) sample ids and positions, packed or padded in any shape."""
        keys = keyed.key(self.seed, step, samples, positions) >> np.uint64(1)
        self.keys = torch.from_numpy(keys.astype(np.int64)).to(device)

    def mask(self, layer: int, rate: float, like: Tensor) -> Tensor:
        """Mask of the shape of `like` (..., D): 0 with probability `rate`, else 1 / (1 - rate)."""
        if self.keys is None:
            raise RuntimeError("KeyedNoise.set was not called before the forward pass")
        table = self._table(rate, like)
        salt = int(keyed.key(self.seed, layer)[0] >> np.uint64(1)) | 1
        rows = ((self.keys ^ salt) * salt >> 20) & (TABLE_ROWS - 1)
        return table.index_select(0, rows.reshape(-1)).view(like.shape)

    def _table(self, rate: float, like: Tensor) -> Tensor:
        name = (rate, like.shape[-1], like.dtype, like.device)
        if name not in self._tables:
            cells = keyed.key(self.seed, like.shape[-1], np.arange(TABLE_ROWS * like.shape[-1]))
            kept = torch.from_numpy(keyed.uniform(cells) >= rate).view(TABLE_ROWS, -1)
            self._tables[name] = (kept.to(torch.float64) / (1 - rate)).to(like.dtype).to(like.device)
        return self._tables[name]


class KeyedDropout(nn.Module):
    """Stands in for nn.Dropout in a stock model."""

    def __init__(self, rate: float, layer: int, noise: KeyedNoise) -> None:
        super().__init__()
        self.p, self.layer, self.noise = rate, layer, noise

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) with entries dropped in training; unchanged otherwise."""
        if not self.training or self.p == 0:
            return x
        return x * self.noise.mask(self.layer, self.p, x)


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
