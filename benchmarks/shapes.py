"""Claim: texts of 1,024 and 8,192 tokens train and are embedded faster than by the stock model of ModernBERT's shape.

Random weights, for speed asks for no others, and all rows of one length, so that no padding is saved: what differs is
local attention, the head on masked tokens alone, and bf16. Every measurement is a process of its own, in the order
a b c a b c .... Batches of `--tokens` tokens; `--layers` cuts the model where 22 layers take too long.

    python benchmarks/shapes.py                                          # an hour on two quiet cores
    python benchmarks/shapes.py --lengths 8192 --layers 6 --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from steps import MASKED, SHAPES, Step, as_the_command, engine_run, model_folder, our_step, stock_mlm, told

SYSTEMS = {
    "embedtune": "padding-free, local attention in blocks or masked, bf16 where the hardware has it",
    "stock": "the stock model, padded, SDPA, fp32",
    "stock-bf16": "the same in bf16: autocast in training, weights in encoding",
}
SOURCE = Path(__file__).resolve()


def long_texts(model: str, length: int, count: int) -> list[str]:
    """Texts of `length` tokens, special ones counted, of the corpus of mixed lines."""
    from transformers import AutoTokenizer

    from mlm import lines_of

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = (word for line in lines_of("mixed", 10**6) for word in line.split())
    texts = []
    for _ in range(count):
        text = " ".join(next(words) for _ in range(length))
        ends = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)["offset_mapping"]
        texts.append(text[: ends[-2][1]])
    return texts


def training(args: argparse.Namespace, texts: list[str], batch: int, home: Path) -> Step:
    from embedtune.encoder.load import quiet
    from embedtune.fit.objectives.prepare import prepare_mlm
    from embedtune.recipes import MLM, Loop

    if args.one == "embedtune":
        as_the_command()
    quiet()
    recipe = MLM(train=texts, dev=texts[:2], model=args.model, max_length=args.length, mask_rate=MASKED,
                 loop=Loop(batch=batch, max_steps=args.steps + 1, epochs=1000))  # fmt: skip
    ready = prepare_mlm(recipe, home, lambda text: None)
    objective = ready.objective
    if (objective.tokens.lengths()[objective.train.whole()] != args.length).any():
        raise SystemExit(f"not all texts have {args.length} tokens")
    if args.one == "embedtune":
        return our_step(engine_run(ready, home))
    rows = [objective.tokens.row(number) for number in objective.train.whole()]
    batches = [rows[first : first + batch] for first in range(0, len(rows) - batch + 1, batch)]
    del ready, objective
    return stock_mlm(args.model, batches, args.one == "stock-bf16")


def encoding(args: argparse.Namespace, texts: list[str], batch: int) -> Step:
    import torch

    from embedtune.encoder.device import fast_precision, pick_device
    from embedtune.encoder.embed import embed
    from embedtune.encoder.embedder import load_embedder, load_stock

    if args.one == "embedtune":
        model, _ = load_embedder(Path(args.model), fast_precision(pick_device()))
    else:
        model = load_stock(Path(args.model)).to(torch.bfloat16 if args.one == "stock-bf16" else torch.float32)
    model.max_seq_length = args.length

    def step(number: int) -> int:
        some = [texts[(number * batch + place) % len(texts)] for place in range(batch)]
        if args.one == "embedtune":
            list(embed(model, some))
        else:
            model.encode(some, batch_size=batch, convert_to_tensor=True, show_progress_bar=False)
        return batch * args.length

    return step


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Speed after one step that is not timed, and the peak of memory, of one system in this process."""
    from mlm import forget_peak, peak_mb

    batch = max(1, args.tokens // args.length)
    texts = long_texts(args.model, args.length, batch * (args.steps + 1))
    with tempfile.TemporaryDirectory() as home:
        step = training(args, texts, batch, Path(home)) if args.task == "mlm" else encoding(args, texts, batch)
        forget_peak()
        step(0)
        start = time.perf_counter()
        tokens = sum(step(number) for number in range(1, args.steps + 1))
    return {"rate": tokens / (time.perf_counter() - start), "peak_mb": peak_mb()}


def measure(system: str, task: str, length: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, SOURCE, "--one", system, "--task", task, "--length", length, "--model", model]
    words += ["--tokens", args.tokens, "--steps", args.steps]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="modernbert", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=list(SYSTEMS)[1:], default=list(SYSTEMS)[1:])
    parser.add_argument("--tasks", nargs="+", choices=("encode", "mlm"), default=["encode", "mlm"])
    parser.add_argument("--one", choices=SYSTEMS, help="one measurement in this process; --model is a folder")
    parser.add_argument("--task", default="mlm", help="with --one")
    parser.add_argument("--length", type=int, help="with --one")
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(one(args)))
        return
    from mlm import hardware

    print(f"{hardware()}\n{args.model}, {args.layers or 'all'} layers, steps of {args.tokens:,} tokens, "
          f"{args.steps} timed, {args.runs} runs")  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        model = model_folder(args.model, Path(home), args.layers)
        for task, length in ((task, length) for task in args.tasks for length in args.lengths):
            systems = ["embedtune", *args.peers]
            rounds = [{s: measure(s, task, length, model, args) for s in systems} for _ in range(args.runs)]
            for system in systems:
                print(f"{task}, {length:,} tokens, {system}: {told(rounds, system, 'rate', 'tokens/s')}", flush=True)


if __name__ == "__main__":
    main()
