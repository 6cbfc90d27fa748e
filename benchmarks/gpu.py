"""Claim: on a GPU BERT-base and ModernBERT-base shapes train faster than by their stock models at their best.

Random weights, lines of mixed lengths cut at 256 tokens. One epoch of so many rows goes before the clock starts (that
compiles), the next is timed: all take the same rows. The peers are plain loops over the stock models with SDPA, bf16
autocast, fused AdamW and batches that were made beforehand, which is more than their trainers do: `stock` in random
order, `grouped` by length, `compiled` by torch as well. Every measurement is a process of its own, a b c a b c ....
The share is that of the measured rate of bf16 matrix products; the work counted is the useful one. At last the loss
curve of the GPU beside that of the CPU.

    python benchmarks/gpu.py                     # half an hour on one GPU
    python benchmarks/gpu.py --tiny              # all of it at tiny sizes, on the CPU, in this process
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from steps import MASKED, SHAPES, Step, engine_run, model_folder, our_step, stock_contrastive, stock_mlm

SYSTEMS = {"mlm": ("embedtune", "stock", "grouped", "compiled"), "contrastive": ("embedtune", "stock", "compiled")}
MAX_LENGTH = 256
SOURCE = Path(__file__).resolve()


def texts_of(count: int, tiny: bool) -> list[str]:
    if tiny:
        from embedtune.data.example import docstrings

        lines = (text for text in docstrings(2 * count) if text)
    else:
        from mlm import lines_of

        lines = (line.strip() for line in lines_of("mixed", 2 * count) if line.strip())
    return list(islice(dict.fromkeys(lines), count))


def mlm(args: argparse.Namespace, home: Path) -> tuple[Step, Any, Any]:
    """The step of a system, the lengths of the rows it takes, and the run where it is ours."""
    from embedtune.fit.objectives.prepare import prepare_mlm
    from embedtune.recipes import MLM, Loop

    texts = texts_of(args.batch * args.steps + 8, args.tiny)
    loop = Loop(batch=args.batch, max_steps=2 * args.steps, epochs=1000, max_tokens=args.max_tokens)
    recipe = MLM(train=texts[8:], dev=texts[:8], model=args.model, max_length=MAX_LENGTH, mask_rate=MASKED, loop=loop)
    ready = prepare_mlm(recipe, home, lambda text: None)
    objective = ready.objective
    objective.train = objective.train[: args.batch * args.steps]
    lengths = objective.tokens.lengths()[objective.train]
    if args.one == "embedtune":
        run = engine_run(ready, home)
        return our_step(run), lengths, run
    rows = [objective.tokens.row(number) for number in objective.train]
    if args.one != "stock":
        rows.sort(key=len)
    batches = [rows[first : first + args.batch] for first in range(0, len(rows), args.batch)]
    backend = ("aot_eager" if args.tiny else "inductor") if args.one == "compiled" else None
    del ready, objective
    return stock_mlm(args.model, batches, True, backend), lengths, None


def contrastive(args: argparse.Namespace, home: Path) -> tuple[Step, Any, Any]:
    """The same of pairs: a line and the next."""
    from embedtune.fit.objectives.contrastive import prepare_contrastive
    from embedtune.recipes import Contrastive, Loop

    texts = texts_of(2 * args.batch * args.steps + 16, args.tiny)
    pairs = [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2])]
    loop = Loop(batch=args.batch, max_steps=2 * args.steps, epochs=1000, max_tokens=args.max_tokens)
    recipe = Contrastive(train=pairs[8:], dev=pairs[:8], model=args.model, max_length=MAX_LENGTH, loop=loop,
                         allow_leaks=True)  # fmt: skip
    ready = prepare_contrastive(recipe, home, lambda text: None)
    lengths = ready.objective.tokens.lengths_of(ready.objective.columns.reshape(-1))
    if args.one == "embedtune":
        run = engine_run(ready, home)
        return our_step(run), lengths, run
    del ready
    batches = [pairs[first : first + args.batch] for first in range(8, len(pairs), args.batch)]
    backend = ("aot_eager" if args.tiny else "inductor") if args.one == "compiled" else None
    return stock_contrastive(args.model, batches, MAX_LENGTH, True, backend), lengths, None


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, useful FLOP/s and the peak of memory of one system in this process."""
    import torch

    from ceiling import flops_per_token
    from embedtune.encoder.device import pick_device
    from embedtune.encoder.load import open_config, quiet
    from mlm import forget_peak, peak_mb

    quiet()
    cuda = pick_device().type == "cuda"
    with tempfile.TemporaryDirectory() as home:
        step, lengths, run = (mlm if args.task == "mlm" else contrastive)(args, Path(home))
        forget_peak()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for number in range(args.steps):
            step(number)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = sum(step(number) for number in range(args.steps, 2 * args.steps))
        if cuda:
            torch.cuda.synchronize()
        rate = tokens / (time.perf_counter() - start)
    masked = MASKED if args.task == "mlm" else 0.0
    flops = flops_per_token(open_config(Path(args.model)), masked, (lengths**2).sum() / lengths.sum())
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_mb()
    return {"rate": rate, "flops": rate * flops, "peak_mb": peak, "max_tokens": run and run.state.max_tokens}


def measure(system: str, task: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    if args.tiny:
        return one(argparse.Namespace(**{**vars(args), "one": system, "task": task, "model": model}))
    words = [sys.executable, SOURCE, "--one", system, "--task", task, "--model", model]
    words += ["--batch", args.batch, "--steps", args.steps]
    words += ["--max-tokens", args.max_tokens] if args.max_tokens else []
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, task: str, model: str, ceiling: float, args: argparse.Namespace) -> None:
    """One line for each system, from alternating runs."""
    rounds = [{name: measure(name, task, model, args) for name in SYSTEMS[task]} for _ in range(args.runs)]
    budget = rounds[0]["embedtune"]["max_tokens"]
    print(f"{shape}, {task}: batch {args.batch}, {args.steps} steps, {args.runs} runs, ours in passes of at most "
          f"{budget:,} tokens")  # fmt: skip
    for name in SYSTEMS[task]:
        rates = sorted(found[name]["rate"] for found in rounds)
        ratios = sorted(found["embedtune"]["rate"] / found[name]["rate"] for found in rounds)
        share = median(found[name]["flops"] for found in rounds) / ceiling
        peak = median(found[name]["peak_mb"] for found in rounds)
        print(f"  {name:<10} {median(rates):11,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), {share:.1%} of the "
              f"ceiling, peak {peak:,.0f} MB; embedtune is {median(ratios):.2f} times as fast ({ratios[0]:.2f} to "
              f"{ratios[-1]:.2f})", flush=True)  # fmt: skip


def curve(args: argparse.Namespace, model: str) -> None:
    """The loss curve of the fast path here beside that of the slow path on the CPU (curves.py)."""
    import curves

    shared = {"seeds": 1, "window": 10, "slow_on_cpu": True, "model": model, "in_process": args.tiny}
    sizes = {"steps": 4, "rows": 40, "max_length": 32} if args.tiny else {"steps": 100, "rows": 4000, "max_length": 128}
    for task in curves.TASKS:
        curves.compare(task, argparse.Namespace(**shared, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to see that it runs")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tasks", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch", type=int, default=256, help="lines, or pairs, of a step")
    parser.add_argument("--steps", type=int, default=30, help="of the epoch that is timed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="of a forward pass of ours (derived)")
    parser.add_argument("--one", help="one measurement in this process; --model is a folder")
    parser.add_argument("--task", choices=SYSTEMS, help="with --one")
    parser.add_argument("--model", help="with --one")
    args = parser.parse_args()
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        args.batch, args.steps, args.runs, args.max_tokens = 8, 2, 1, 4096
    if args.one:
        print("\n" + json.dumps(one(args)))
        return
    import torch

    from embedtune.encoder.device import pick_device
    from embedtune.encoder.load import DEFAULT, open_config
    from embedtune.fit.ceiling import rate
    from embedtune.fit.derive import widths
    from mlm import hardware

    device = pick_device()
    if device.type != "cuda" and not args.tiny:
        print("no GPU here, nothing is measured; --tiny shows that the script runs")
        return
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU, tiny sizes'}; {hardware()}")
    with tempfile.TemporaryDirectory() as home:
        for shape in args.shapes:
            model = model_folder(shape, Path(home), tiny=args.tiny)
            ceiling = rate(*widths(open_config(Path(model))), torch.bfloat16, device, 2 if args.tiny else None)
            print(f"{shape}: {ceiling / 1e12:.3g} TFLOP/s of bf16 matrix products at its widths")
            for task in args.tasks:
                compare(shape, task, model, ceiling, args)
        print("the GPU beside the CPU in fp32:" if device.type == "cuda" else "the fast path beside the slow one:")
        curve(args, model if args.tiny else DEFAULT)


if __name__ == "__main__":
    main()
