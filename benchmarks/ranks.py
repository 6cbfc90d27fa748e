"""Claim: two processes train almost twice as fast as one, and what they exchange is one mean of all gradients a step.

Two processes with a thread each, started by torchrun. In turns the first one takes a step of masked language modelling
alone while the other waits, then both take one together: so what else the machine does disturbs both alike. The least
and the middle of so many turns are told. Then the mean of all gradients by itself: in one buffer, as the loop takes it,
and with a call for each parameter.

    python benchmarks/ranks.py --turns 15
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from embedtune import tune
from embedtune.data.example import docstrings
from embedtune.fit import ranks
from embedtune.fit.optimizer import BODY, HEAD, Optimizer
from embedtune.recipes import MLM, Loop


def told(name: str, times: list[float]) -> str:
    return f"{name}: {min(times):.3f} s at least, {statistics.median(times):.3f} s in the middle"


def timed(work: Callable[[], object]) -> float:
    """Seconds until the slower process is done."""
    ranks.most([0.0])  # both start at once
    start = time.perf_counter()
    work()
    return ranks.most([time.perf_counter() - start])[0]


def steps(args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """Steps alone and together in turns; the masters, with gradients."""
    loop = Loop(batch=args.batch, max_tokens=args.max_tokens)
    recipe = MLM(train="data.txt", head_steps=0, dev_rows=16, max_length=args.max_length, loop=loop)
    objective = tune.prepare(recipe, Path("home"), lambda text: None).objective
    optimizer = Optimizer(objective.model, [], 0.01, objective.body if args.precision == "bf16" else None)
    masters, first = list(optimizer.masters.values()), ranks.world()[0] == 0

    def step(number: int) -> None:
        epoch, rows = objective.rows(number, args.batch, 0)
        found = objective.step(number, epoch, rows, args.max_tokens)
        ranks.mean_gradients(masters, found.weight, found.loss, found.tokens)
        optimizer.clip(1.0)
        optimizer.step({HEAD: 1e-9, BODY: 1e-9})
        optimizer.clear()

    def alone(number: int) -> None:
        with patch.object(ranks, "world", lambda: (0, 1)):
            step(number)

    one, both = [], []
    for number in range(args.turns + 2):
        one.append(timed(lambda: alone(number) if first else None))  # noqa: B023 - called at once
        both.append(timed(lambda: step(number)))  # noqa: B023
    one, both = one[2:], both[2:]
    if first:
        print(told("a step in one process", one))
        print(told("a step in two", both))
        print(f"ratio {min(one) / min(both):.2f} of the least, {statistics.median(one) / statistics.median(both):.2f} "
              f"of the middle; {recipe.train}, {args.batch} rows, {args.precision}")  # fmt: skip
    return masters


def sums(parameters: list[torch.nn.Parameter]) -> None:
    """The mean of all gradients, as it is and in smaller pieces, and four numbers."""

    def whole() -> None:
        ranks.mean_gradients(parameters, 1.0, 0.0, 0)

    def each() -> None:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)

    ways = {"in one buffer": whole, "one by one": each, "four numbers": lambda: ranks.most([0.0] * 4)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(15):
        for name, work in ways.items():
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            found[name].append(timed(work))
    if ranks.world()[0] == 0:
        count = sum(parameter.numel() for parameter in parameters)
        print(f"gradients: {len(parameters)} tensors, {count:,} numbers, {4 * count:,} bytes")
        for name, times in found.items():
            print(told(f"  {name}", times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    if ranks.launched()[1] > 1:
        with ranks.started():
            sums(steps(args))
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = [text for text in docstrings(700) if text]
        Path(folder, "data.txt").write_text("\n".join(lines) + "\n")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, str(Path(__file__).resolve()), *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, cwd=folder, env=environment).returncode)


if __name__ == "__main__":
    main()
