"""Embeddings computed once and read many times: memory maps in a folder of temporary files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.encoder.embed import embed
from embedtune.errors import UserError
from embedtune.refine.concepts import Encoding, encode
from embedtune.refine.statistics import BLOCK, refuse_non_finite

SAY_SECONDS = 10
Labelled = tuple[str, Mapping[str, Any]]  # a text, and the values of its concepts


@dataclass(frozen=True, eq=False)
class Cached:
    """Vectors, token counts and encoded columns of n texts, as memory maps."""

    x: np.ndarray  # (n, d) float32
    tokens: np.ndarray  # (n,) int64: what the model saw, special ones included
    z: np.ndarray  # (n, k) float64: the columns' concepts beside each other
    truncated: int  # texts that were longer than the model reads
    norms: tuple[float, float]  # smallest and largest of x

    def blocks(self, rows: int = BLOCK) -> Iterator[slice]:
        """Slices that cover all rows."""
        return (slice(start, start + rows) for start in range(0, len(self.x), rows))


def cache(
    folder: Path,
    model: Any,
    rows: Iterable[Labelled],
    encodings: Sequence[Encoding] = (),
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Cached:
    """Embed a stream of texts into memory maps in `folder`; memory is flat in their number.

    Raises UserError for vectors that are not finite, and where there is no text.
    """
    waiting: list[Mapping[str, Any]] = []
    names = ("x", "tokens", "z")
    n, d, truncated, low, high, said = 0, 0, 0, np.inf, 0.0, time.monotonic()
    with ExitStack() as stack:
        x_file, tokens_file, z_file = (stack.enter_context(files.growing(folder / name)) for name in names)
        for block in embed(model, _texts(rows, waiting)):
            refuse_non_finite(block.vectors, n)
            values = waiting[: len(block.tokens)]
            del waiting[: len(values)]
            columns = {each.name: [value[each.name] for value in values] for each in encodings}
            x_file.write(np.ascontiguousarray(block.vectors, np.float32).tobytes())
            tokens_file.write(block.tokens.astype(np.int64).tobytes())
            z_file.write(encode(encodings, columns, block.tokens).tobytes())
            norms = np.linalg.norm(block.vectors.astype(np.float64), axis=1)
            low, high = min(low, float(norms.min())), max(high, float(norms.max()))
            n, d, truncated = n + len(values), block.vectors.shape[1], truncated + block.truncated
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                note(f"embedded {n:,} texts")
    if not n:
        raise UserError("there is no text to fit on")
    k = sum(each.width for each in encodings)
    kinds: list[tuple[Any, tuple[int, ...]]] = [(np.float32, (n, d)), (np.int64, (n,)), (np.float64, (n, k))]
    x, tokens, z = (
        np.memmap(folder / name, kind, mode="r", shape=shape) if np.prod(shape) else np.zeros(shape, kind)
        for name, (kind, shape) in zip(names, kinds, strict=True)
    )
    return Cached(x, tokens, z, truncated, (low, high))


def cached_of(x: np.ndarray, tokens: np.ndarray) -> Cached:
    """Vectors (n, d) and tokens (n,) that are in memory already, without columns."""
    refuse_non_finite(x)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    return Cached(x, tokens, np.zeros((len(x), 0)), 0, (float(norms.min()), float(norms.max())))


def _texts(rows: Iterable[Labelled], waiting: list[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of rows; their values wait until the vectors come."""
    for text, values in rows:
        waiting.append(values)
        yield text
