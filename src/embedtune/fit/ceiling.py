"""The machine's ceiling: how many matrix-product FLOPs a second it does at the shapes of an encoder's layers."""

from __future__ import annotations

import time

import torch

ROWS = 4096  # tokens in a batch
TRIES = 30


def layer_shapes(hidden: int, inner: int) -> dict[tuple[int, int], int]:
    """(columns in, columns out) of the matrix products of one layer, and how often each occurs."""
    return {(hidden, hidden): 4, (hidden, inner): 1, (inner, hidden): 1}


def best_seconds(columns: int, out: int, dtype: torch.dtype, device: torch.device, tries: int) -> float:
    """Shortest time of one (ROWS, columns) x (columns, out) product into memory that is already there."""
    x = torch.randn(ROWS, columns, device=device).to(dtype)
    weight = torch.randn(out, columns, device=device).to(dtype)
    result = torch.empty(ROWS, out, dtype=dtype, device=device)
    best = float("inf")
    # A weight stored (out, in) as in nn.Linear, and stored (in, out): whichever the library likes better.
    for operand in (weight.t(), weight.t().contiguous()):
        for _ in range(tries):
            _wait(device)
            start = time.perf_counter()
            torch.mm(x, operand, out=result)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(hidden: int, inner: int, dtype: torch.dtype, device: torch.device, tries: int | None = None) -> float:
    """FLOP/s of a whole layer's mix of shapes; takes a second or two."""
    work = seconds = 0.0
    for (columns, out), times in layer_shapes(hidden, inner).items():
        work += times * 2 * ROWS * columns * out
        seconds += times * best_seconds(columns, out, dtype, device, tries or TRIES)
    return work / seconds
