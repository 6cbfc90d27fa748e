"""The machine's ceiling: how many matrix-product FLOPs a second it does at the shapes of an encoder's layers."""

from __future__ import annotations

import time

import torch

TRIES = 30
TOGETHER = 10  # a GPU is given so many products at once, or the clock would measure the asking


def rows_on(device: torch.device) -> int:
    """Tokens in a batch: a GPU is not filled by what fills a CPU."""
    return 32_768 if device.type == "cuda" else 4096


def layer_shapes(hidden: int, inner: int) -> dict[tuple[int, int], int]:
    """(columns in, columns out) of the matrix products of one layer, and how often each occurs."""
    return {(hidden, hidden): 4, (hidden, inner): 1, (inner, hidden): 1}


def best_seconds(columns: int, out: int, dtype: torch.dtype, device: torch.device, tries: int) -> float:
    """Shortest time of one (rows, columns) x (columns, out) product into memory that is already there."""
    rows, together = rows_on(device), TOGETHER if device.type == "cuda" else 1
    x = torch.randn(rows, columns, device=device).to(dtype)
    weight = torch.randn(out, columns, device=device).to(dtype)
    result = torch.empty(rows, out, dtype=dtype, device=device)
    best = float("inf")
    # A weight stored (out, in) as in nn.Linear, and stored (in, out): whichever the library likes better.
    for operand in (weight.t(), weight.t().contiguous()):
        for _ in range(tries):
            _wait(device)
            start = time.perf_counter()
            for _ in range(together):
                torch.mm(x, operand, out=result)
            _wait(device)
            best = min(best, (time.perf_counter() - start) / together)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(hidden: int, inner: int, dtype: torch.dtype, device: torch.device, tries: int | None = None) -> float:
    """FLOP/s of a whole layer's mix of shapes; takes a second or two."""
    work = seconds = 0.0
    for (columns, out), times in layer_shapes(hidden, inner).items():
        work += times * 2 * rows_on(device) * columns * out
        seconds += times * best_seconds(columns, out, dtype, device, tries or TRIES)
    return work / seconds
