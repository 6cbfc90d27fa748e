"""The machine's ceiling: how many matrix-product FLOPs a second it does at the shapes of an encoder's layers.

Tokens a second say little about how much is left to win; the share of this ceiling does. `flops_per_token` counts
the useful work of a training step only, so padding, recomputation and a head run on unmasked tokens earn nothing.

    python benchmarks/ceiling.py
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

ROWS = 4096  # tokens in a batch


def layer_shapes(hidden: int, inner: int) -> dict[tuple[int, int], int]:
    """(columns in, columns out) of the matrix products of one layer, and how often each occurs."""
    return {(hidden, hidden): 4, (hidden, inner): 1, (inner, hidden): 1}


def best_seconds(columns: int, out: int, dtype: torch.dtype, tries: int) -> float:
    """Shortest time of one (ROWS, columns) x (columns, out) product into memory that is already there."""
    x = torch.randn(ROWS, columns).to(dtype)
    weight = torch.randn(out, columns).to(dtype)
    result = torch.empty(ROWS, out, dtype=dtype)
    best = float("inf")
    # A weight stored (out, in) as in nn.Linear, and stored (in, out): whichever the library likes better.
    for operand in (weight.t(), weight.t().contiguous()):
        for _ in range(tries):
            start = time.perf_counter()
            torch.mm(x, operand, out=result)
            best = min(best, time.perf_counter() - start)
    return best


def measure(hidden: int = 384, inner: int = 1536, tries: int = 30) -> dict[str, float]:
    """FLOP/s per dtype and shape, and under "bf16" and "fp32" those of a whole layer's mix of shapes."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        work = seconds = 0.0
        for (columns, out), times in layer_shapes(hidden, inner).items():
            took = best_seconds(columns, out, dtype, tries)
            rates[f"{name} {ROWS}x{columns}x{out}"] = 2 * ROWS * columns * out / took
            work += times * 2 * ROWS * columns * out
            seconds += times * took
        rates[name] = work / seconds
    return rates


def flops_per_token(config: Any, mask_rate: float, mean_length: float) -> float:
    """Useful FLOPs of one masked-language training step per real token, forward and backward (3 x forward).

    Per layer 6 x its matmul weights and 12 x hidden x length for the two attention products; the head's transform and
    vocabulary matrices on the masked tokens only. `mean_length` is the mean over *tokens* of the length of their row
    (sum of squares over sum), because that is how many keys a token meets.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    gated = config.model_type == "modernbert"  # its feed-forward has a gate beside the way up
    weights = sum(columns * out * times for (columns, out), times in layer_shapes(hidden, inner).items())
    weights += hidden * inner if gated else 0
    layers = config.num_hidden_layers * (6 * weights + 12 * hidden * mean_length)
    return layers + mask_rate * 6 * (hidden * hidden + hidden * config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    rates = measure(args.hidden, args.inner, args.tries)
    if args.json:
        print(json.dumps(rates))
        return
    for name, rate in rates.items():
        print(f"{name:24} {rate / 1e9:8,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
