"""Claim: on a GPU BERT-base and ModernBERT-base shapes train faster than by their stock models at their best.

Random weights, lines of mixed lengths cut at 256 tokens. The peers are plain loops over the stock models with SDPA,
bf16 autocast, fused AdamW and batches that were made beforehand, which is more than their trainers do: `stock` in
random order, `grouped` by length, `compiled` by torch as well, in passes of 128 rows. All take the same rows. Each
system makes two epochs of them before its clock starts (which compiles, and lets libraries choose their kernels); then
all are timed in turn, an epoch each, a b c a b c ..., in one process: what is on a GPU does not disturb what stands
still beside it. Memory is what a system's first epochs took beyond what was there before. The share is that of the
measured rate of bf16 matrix products; the work counted is the useful one. At last the loss curve of the GPU beside
that of the CPU.

    python benchmarks/gpu.py                     # a quarter of an hour on one GPU, half of it the compiler's
    python benchmarks/gpu.py --tiny              # all of it at tiny sizes, on the CPU
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from steps import MASKED, SHAPES, Step, engine_run, model_folder, our_step, stock_contrastive, stock_mlm

OURS = {"embedtune": True, "embedtune-plain": False}  # whether its layers are compiled
SYSTEMS = {
    "mlm": (*OURS, "stock", "grouped", "compiled"),
    "contrastive": (*OURS, "stock", "compiled"),
}
BATCH = {"mlm": 256, "contrastive": 128}  # lines, or pairs, of a step
PASS = 128  # rows of a forward pass of a peer
MAX_LENGTH, WARM = 256, 2  # epochs before the clock starts


def texts_of(count: int, tiny: bool) -> list[str]:
    if tiny:
        from embedtune.data.example import docstrings

        lines = (text for text in docstrings(2 * count) if text)
    else:
        from mlm import lines_of

        lines = (line.strip() for line in lines_of("mixed", 2 * count) if line.strip())
    return list(islice(dict.fromkeys(lines), count))


def mlm(system: str, model: str, batch: int, home: Path, args: argparse.Namespace) -> tuple[Step, Any, Any]:
    """The step of a system, the lengths of the rows it takes, and the run where it is ours."""
    from embedtune.fit.objectives.prepare import prepare_mlm
    from embedtune.recipes import MLM, Loop

    texts = texts_of(batch * args.steps + 8, args.tiny)
    loop = Loop(batch=batch, max_steps=100 * args.steps, epochs=1000, max_tokens=args.max_tokens)
    recipe = MLM(train=texts[8:], dev=texts[:8], model=model, max_length=MAX_LENGTH, mask_rate=MASKED, loop=loop)
    ready = prepare_mlm(recipe, home, lambda text: None)
    objective = ready.objective
    objective.train = objective.train.whole()[: batch * args.steps]
    lengths = objective.tokens.lengths()[objective.train]
    if system in OURS:
        run = engine_run(ready, home)
        return our_step(run), lengths, run
    rows = [objective.tokens.row(number) for number in objective.train]
    if system != "stock":
        rows.sort(key=len)
    size = min(PASS, batch)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    backend = ("aot_eager" if args.tiny else "inductor") if system == "compiled" else None
    return stock_mlm(model, batches, True, backend, parts=batch // size), lengths, None


def contrastive(system: str, model: str, batch: int, home: Path, args: argparse.Namespace) -> tuple[Step, Any, Any]:
    """The same of pairs: a line and the next."""
    from embedtune.fit.objectives.contrastive import prepare_contrastive
    from embedtune.recipes import Contrastive, Loop

    texts = texts_of(2 * batch * args.steps + 16, args.tiny)
    pairs = [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2])]
    loop = Loop(batch=batch, max_steps=100 * args.steps, epochs=1000, max_tokens=args.max_tokens)
    recipe = Contrastive(train=pairs[8:], dev=pairs[:8], model=model, max_length=MAX_LENGTH, loop=loop,
                         allow_leaks=True)  # fmt: skip
    ready = prepare_contrastive(recipe, home, lambda text: None)
    lengths = ready.objective.tokens.lengths_of(ready.objective.columns.reshape(-1))
    if system in OURS:
        run = engine_run(ready, home)
        return our_step(run), lengths, run
    batches = [pairs[first : first + batch] for first in range(8, len(pairs), batch)]
    backend = ("aot_eager" if args.tiny else "inductor") if system == "compiled" else None
    return stock_contrastive(model, batches, MAX_LENGTH, True, backend), lengths, None


TASKS = {"mlm": mlm, "contrastive": contrastive}


class System:
    """One of those that are compared: its steps, and what its first epoch took."""

    def __init__(self, name: str, task: str, model: str, home: Path, args: argparse.Namespace) -> None:
        import torch

        from embedtune.encoder.device import pick_device
        from embedtune.fit import gpu

        self.name, self.steps, self.device = name, args.steps, pick_device()
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        folder = home / f"{task}-{name}"
        folder.mkdir()
        self.step, self.lengths, run = TASKS[task](name, model, args.batch or BATCH[task], folder, args)
        self.budget = run.state.max_tokens if run else None
        self.ways = ExitStack()  # as train() has them around its loop
        if run is not None and OURS[name] and not args.tiny:
            self.ways.enter_context(gpu.compiled(run.objective.body, True))
        self.done = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(WARM):
            self.epoch()
        self.warm = time.perf_counter() - start
        self.peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0

    def epoch(self) -> float:
        """Real tokens a second of the next epoch."""
        import torch._dynamo

        from embedtune.encoder.device import repeatable

        # Where our layers cannot be compiled they run as they are; a peer's are to be compiled, or to fail.
        strict = torch._dynamo.config.patch(suppress_errors=False)
        with repeatable(self.device) if self.name in OURS else strict:
            self._wait()
            start = time.perf_counter()
            tokens = sum(self.step(self.done + number) for number in range(self.steps))
            self._wait()
        self.done += self.steps
        return tokens / (time.perf_counter() - start)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(shape: str, task: str, model: str, ceiling: float, args: argparse.Namespace) -> None:
    """One line for each system, from alternating epochs."""
    import torch

    from ceiling import flops_per_token
    from embedtune.encoder.load import open_config

    with tempfile.TemporaryDirectory() as home:
        names = [name for name in SYSTEMS[task] if name not in args.without]
        systems = []
        for name in names:
            try:
                systems.append(System(name, task, model, Path(home), args))
            except torch.OutOfMemoryError:
                print(f"  {name}: out of memory", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            print(f"  {name}: first epochs {systems[-1].warm:.1f} s", flush=True)
        rounds = [{system.name: system.epoch() for system in systems} for _ in range(args.runs)]
    lengths = systems[0].lengths
    flops = flops_per_token(open_config(Path(model)), MASKED if task == "mlm" else 0.0,
                            (lengths**2).sum() / lengths.sum())  # fmt: skip
    print(f"{shape}, {task}: batch {args.batch or BATCH[task]}, {args.steps} steps, {args.runs} runs, ours in passes "
          f"of at most {systems[0].budget:,} tokens; {lengths.mean():.0f} tokens a row")  # fmt: skip
    for system in systems:
        rates = sorted(found[system.name] for found in rounds)
        ratios = sorted(found["embedtune"] / found[system.name] for found in rounds)
        print(f"  {system.name:<15} {median(rates):11,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), "
              f"{median(rates) * flops / ceiling:.1%} of the ceiling, {system.peak:,.0f} MB; embedtune is "
              f"{median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip
        system.ways.close()
    del systems, system
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def curve(args: argparse.Namespace, model: str) -> None:
    """The loss curve of the fast path here beside that of the slow path on the CPU (curves.py)."""
    import curves

    shared = {"seeds": 1, "window": 10, "slow_on_cpu": True, "model": model, "in_process": args.tiny}
    sizes = {"steps": 4, "rows": 40, "max_length": 32} if args.tiny else {"steps": 60, "rows": 2000, "max_length": 128}
    for task in curves.TASKS:
        curves.compare(task, argparse.Namespace(**shared, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to see that it runs")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    others = sorted({name for names in SYSTEMS.values() for name in names} - {"embedtune"})
    parser.add_argument("--without", nargs="*", default=[], choices=others, help="systems to leave out")
    parser.add_argument("--batch", type=int, help="lines, or pairs, of a step (256 lines, 128 pairs)")
    parser.add_argument("--steps", type=int, default=12, help="of an epoch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="of a forward pass of ours (derived)")
    parser.add_argument("--no-curve", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        args.batch, args.steps, args.runs, args.max_tokens = 8, 2, 1, 4096
    import torch

    from embedtune.encoder.device import pick_device
    from embedtune.encoder.load import DEFAULT, open_config, quiet
    from embedtune.fit.ceiling import rate
    from embedtune.fit.derive import widths
    from mlm import hardware

    quiet()
    device = pick_device()
    if device.type != "cuda" and not args.tiny:
        print("no GPU here, nothing is measured; --tiny shows that the script runs")
        return
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU, tiny sizes'}; {hardware()}")
    with tempfile.TemporaryDirectory() as home:
        model = DEFAULT
        for shape in args.shapes:
            model = model_folder(shape, Path(home), tiny=args.tiny)
            ceiling = rate(*widths(open_config(Path(model))), torch.bfloat16, device, 2 if args.tiny else None)
            print(f"{shape}: {ceiling / 1e12:.3g} TFLOP/s of bf16 matrix products at its widths", flush=True)
            for task in args.tasks:
                compare(shape, task, model, ceiling, args)
        if not args.no_curve:
            print("the GPU beside the CPU in fp32:" if device.type == "cuda" else "the fast path beside the slow one:")
            curve(args, model if args.tiny else DEFAULT)


if __name__ == "__main__":
    main()
