"""The machine's ceiling: how many matrix-product FLOPs a second it does at the shapes of an encoder's layers.

Tokens a second say little about how much is left to win; the share of this ceiling does. `flops_per_token` counts
the useful work of a training step only, so padding, recomputation and a head run on unmasked tokens earn nothing.

    python benchmarks/ceiling.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from embedtune.fit.ceiling import best_seconds, layer_shapes, rate, rows_on


def measure(hidden: int = 384, inner: int = 1536, tries: int = 30) -> dict[str, float]:
    """FLOP/s per dtype and shape, and under "bf16" and "fp32" those of a whole layer's mix of shapes."""
    rates, cpu = {}, torch.device("cpu")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for columns, out in layer_shapes(hidden, inner):
            took = best_seconds(columns, out, dtype, cpu, tries)
            rates[f"{name} {rows_on(cpu)}x{columns}x{out}"] = 2 * rows_on(cpu) * columns * out / took
        rates[name] = rate(hidden, inner, dtype, cpu, tries)
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
    for name, found in rates.items():
        print(f"{name:24} {found / 1e9:8,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
