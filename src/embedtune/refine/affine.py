"""One type for everything that `refine` does to vectors: erasure, whitening, PCA and truncation are all affine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.errors import UserError


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> weight x + bias, in float64; weight (m, d), bias (m,)."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def identity(cls, d: int) -> Affine:
        """The map that changes nothing."""
        return cls(np.eye(d), np.zeros(d))

    def then(self, other: Affine) -> Affine:
        """This map first, `other` on what it gives."""
        return Affine(other.weight @ self.weight, other.weight @ self.bias + other.bias)

    def __call__(self, x: Any) -> Any:
        """Vectors (d,) or (n, d) mapped to (m,) or (n, m): numpy or torch, same dtype and device out, float64 inside.

        Torch gradients flow through. Raises UserError for what is not floating-point or has another dimension.
        """
        if type(x).__module__.partition(".")[0] != "torch":
            array = np.asarray(x)
            self._check(array.dtype.kind == "f", array.shape)
            return (array.astype(np.float64) @ self.weight.T + self.bias).astype(array.dtype)
        import torch

        self._check(x.is_floating_point(), tuple(x.shape))
        place = "cpu" if x.device.type == "mps" else x.device  # mps has no float64
        weight, bias = (torch.from_numpy(a).to(place) for a in (self.weight, self.bias))
        return (x.to(place, torch.float64) @ weight.T + bias).to(x.device, x.dtype)

    def _check(self, floating: bool, shape: tuple[int, ...]) -> None:
        if not floating or len(shape) not in (1, 2):
            raise UserError("embeddings must be floating-point numbers of shape (d,) or (n, d)")
        if shape[-1] != self.weight.shape[1]:
            what = f"embeddings have {shape[-1]:,} dimensions, the map was fitted on {self.weight.shape[1]:,}"
            raise UserError(what, fix="use the embeddings of this very model")
