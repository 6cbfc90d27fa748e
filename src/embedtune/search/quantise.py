"""Vectors in fewer bytes: the arithmetic of sentence-transformers' quantize_embeddings, its ranges kept."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from embedtune.errors import UserError

Dtype = Literal["float32", "float16", "int8", "binary"]


def check_dtype(dtype: str) -> None:
    """A UserError for a type that vectors cannot have."""
    if dtype not in get_args(Dtype):
        raise UserError(f"must be one of {', '.join(get_args(Dtype))}, not {dtype!r}", where="--dtype")


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """The smallest and the largest number of each dimension: (2, D) float32."""
    return np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)


def quantise(vectors: np.ndarray, dtype: Dtype, ranges: np.ndarray | None = None) -> np.ndarray:
    """Float32 vectors (B, D) as `dtype`: (B, D), or (B, ceil(D / 8)) int8 for "binary".

    int8 cuts the range of each dimension into 255 steps: code = floor((x - low) / step) - 128, and what lies outside
    goes to the nearest end. binary keeps the signs: bits packed, 128 subtracted.
    """
    if dtype == "float32" or dtype == "float16":
        return vectors.astype(dtype)
    from sentence_transformers.util.quantization import quantize_embeddings

    packed: Any = quantize_embeddings(vectors, dtype, ranges)
    return packed


def restored(codes: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The middle of the step that each int8 code stands for: (B, D) float32."""
    step = (ranges[1] - ranges[0]) / 255
    return (ranges[0] + (codes.astype(np.float32) + 128.5) * step).astype(np.float32)


def outside(vectors: np.ndarray, ranges: np.ndarray) -> int:
    """How many numbers lie outside of the ranges."""
    return int(((vectors < ranges[0]) | (vectors > ranges[1])).sum())
