"""Claim: `embedtune fit contrastive` is several times as fast as SentenceTransformerTrainer, in flat memory.

All systems start from all-MiniLM-L6-v2 and take the same pairs (a line and the next of a text of mixed lengths, cut at
256 tokens), MultipleNegativesRankingLoss with scale 20, the same batch, learning rate and steps. Every measurement is
a process of its own, in the order a b c a b c ..., so that noise hits all alike. Timed are training steps only (with
their collation), from the end of the second to the end of the last.

    python benchmarks/contrastive.py                          # everything: about an hour on two quiet cores
    python benchmarks/contrastive.py --pairs medquad --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from mlm import forget_peak, lines_of, peak_mb
from steps import as_the_command, engine_run, model_folder, told

SYSTEMS = {
    "embedtune": "embedtune, defaults",
    "trainer": "SentenceTransformerTrainer, defaults (fp32, padded, random batches)",
    "trainer-best": "SentenceTransformerTrainer, at its best (bf16 where the hardware has it, no duplicates)",
    "cached": "SentenceTransformerTrainer with CachedMultipleNegativesRankingLoss, mini-batch 32",
}
LR, MAX_LENGTH, UNTIMED = 2e-5, 256, 2
SOURCE = Path(__file__).resolve()
DATA = Path(os.environ.get("EMBEDTUNE_TEST_DATA", SOURCE.parents[2] / "shared" / "data"))


def lines(count: int) -> Iterator[str]:
    """The first lines of a text of 3 to 400 words a line."""
    return (line.strip() for line in lines_of("mixed", count))


def pairs_of(kind: str, count: int) -> list[dict[str, str]]:
    """So many pairs of distinct texts."""
    if kind == "medquad":
        with open(DATA / "medquad" / "medquad.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        pairs = [{"anchor": row["question"], "positive": row["answer"]} for row in rows if row["answer"].strip()]
        seen: dict[str, dict[str, str]] = {}
        for pair in pairs:
            seen.setdefault(pair["anchor"], pair)
        kept = list({pair["positive"]: pair for pair in seen.values()}.values())
        return kept[:count]
    texts = [line for line in dict.fromkeys(lines(2 * count + 200)) if line][: 2 * count]
    return [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]


def embedtune(pairs: list[dict[str, str]], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The engine's own steps, with its log, without scoring and checkpoints."""
    from embedtune.fit.objectives.contrastive import prepare_contrastive
    from embedtune.recipes import Contrastive, Loop

    as_the_command()
    loop = Loop(
        batch=args.batch, lr=LR, max_steps=args.steps, epochs=1000, measure="dev_loss", max_tokens=args.max_tokens
    )
    dev = [{"anchor": f"a question about {n}", "positive": f"an answer to {n}"} for n in range(10)]
    recipe = Contrastive(train=pairs, dev=dev, model=args.model, max_length=MAX_LENGTH, loop=loop)
    run = engine_run(prepare_contrastive(recipe, work, lambda text: None), work)
    stamps, tokens = [], []
    forget_peak()
    run.clock = time.monotonic()
    for _ in range(args.steps):
        before = run.state.tokens
        run._step()
        stamps.append(time.perf_counter())
        tokens.append(run.state.tokens - before)
    return {"stamps": stamps, "tokens": tokens, "precision": run.loop.precision, "max_tokens": run.state.max_tokens}


def trainer(pairs: list[dict[str, str]], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """sentence-transformers' own trainer, timed by a callback at the end of every step."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    from embedtune.encoder.device import has_bf16, pick_device
    from embedtune.encoder.load import find, quiet

    quiet()
    model = SentenceTransformer(str(find(args.model)), device=str(pick_device()))
    model.max_seq_length = MAX_LENGTH
    best = args.one == "trainer-best"
    loss: Any = losses.MultipleNegativesRankingLoss(model)
    if args.one == "cached":
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    bf16 = best and has_bf16(pick_device())
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(work / "out"), per_device_train_batch_size=args.batch, max_steps=args.steps, learning_rate=LR,
        bf16=bf16, use_cpu=pick_device().type == "cpu",
        batch_sampler=BatchSamplers.NO_DUPLICATES if best else BatchSamplers.BATCH_SAMPLER,
        save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    made = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(pairs), loss=loss, callbacks=[Clock()]
    )
    forget_peak()
    made.train()
    return {"stamps": stamps, "precision": "bf16" if bf16 else "fp32"}


def one(args: argparse.Namespace) -> None:
    """One measurement; the result is the last line on stdout."""
    pairs = pairs_of(args.pairs, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        found = (embedtune if args.one == "embedtune" else trainer)(pairs, args, Path(folder))
    seconds = found["stamps"][-1] - found["stamps"][UNTIMED - 1]
    steps = len(found["stamps"]) - UNTIMED
    tokens = sum(found["tokens"][UNTIMED:]) if "tokens" in found else None
    print(json.dumps({
        "system": args.one, "pairs_per_second": steps * args.batch / seconds, "peak_mb": peak_mb(),
        "tokens_per_second": tokens / seconds if tokens else None, "precision": found["precision"],
        "max_tokens": found.get("max_tokens"),
    }))  # fmt: skip


def measure(system: str, batch: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """A process of its own."""
    command = [sys.executable, str(SOURCE), "--one", system, "--batch", str(batch), "--steps", str(steps)]
    # Whole batches only: the rest of an epoch would run in one pass and hold more than a cached batch does.
    rows = batch * max(2, -(-args.rows // batch))
    command += ["--pairs", args.pairs, "--rows", str(rows), "--model", args.model]
    if args.max_tokens:
        command += ["--max-tokens", str(args.max_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"  {system:<14} batch {batch:>4}: {found['pairs_per_second']:8.2f} pairs/s {found['peak_mb']:8,.0f} MB",
        flush=True,
    )
    return found


def speed(args: argparse.Namespace) -> None:
    """Pairs a second of all systems, and how many times as many ours does."""
    rounds = [{name: measure(name, args.batch, args.steps, args) for name in args.systems} for _ in range(args.runs)]
    for name in args.systems:
        print(f"{name} ({rounds[0][name]['precision']}): {told(rounds, name, 'pairs_per_second', 'pairs/s')}")


def memory(args: argparse.Namespace) -> None:
    """The peak at several batches, those beyond the token budget through the gradient cache."""
    peaks = {batch: measure("embedtune", batch, 4, args)["peak_mb"] for batch in args.memory_batches}
    first = next(iter(peaks.values()))
    for batch, peak in peaks.items():
        print(f"memory: batch {batch} {peak:,.0f} MB, {peak / first:.2f} times the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=SYSTEMS)
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="or bert-base, modernbert: random weights")
    parser.add_argument("--pairs", choices=("mixed", "medquad"), default="mixed")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--systems", nargs="+", default=["embedtune", "trainer", "trainer-best"])
    parser.add_argument("--memory", action="store_true", help="only the memory")
    parser.add_argument("--memory-batches", type=int, nargs="+", default=[32, 512], help="beside the first one")
    parser.add_argument("--no-memory", action="store_true", help="only the speed")
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        name, args.model = args.model, model_folder(args.model, Path(folder))
        print(f"{date.today()}: {name}, {args.pairs} pairs, batch {args.batch}, {args.steps - UNTIMED} timed steps, "
              f"{args.runs} runs")  # fmt: skip
        if not args.memory:
            speed(args)
        if not args.no_memory:
            memory(args)


if __name__ == "__main__":
    main()
