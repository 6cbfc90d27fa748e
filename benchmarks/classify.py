"""Claim: `embedtune fit classify` is several times as fast as transformers' Trainer, at the same loss.

All systems start from --model (all-MiniLM-L6-v2) with a fresh two-class head, take the same texts of mixed lengths (3
to 400 words, cut at 256 tokens, labelled by a word that stands in them or not), the same batch, learning rate and
steps. Every measurement is a process of its own, in the order a b c a b c ..., so that noise hits all alike. Timed are
training steps only, from the end of the second to the end of the last.

    python benchmarks/classify.py                 # three systems, five runs each: about half an hour on two quiet cores
    python benchmarks/classify.py --runs 3 --batch 32
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from contrastive import lines
from mlm import forget_peak, peak_mb
from steps import as_the_command, engine_run, model_folder, told

SYSTEMS = {
    "embedtune": "embedtune, defaults",
    "trainer": "Trainer, defaults (fp32, padded to the longest of the batch)",
    "trainer-best": "Trainer, at its best (grouped by length; bf16 where the hardware has it)",
}
LR, MAX_LENGTH, UNTIMED = 5e-5, 256, 2
WORD = "he"
SOURCE = Path(__file__).resolve()


def rows_of(count: int) -> list[dict[str, Any]]:
    """Texts with the label that a word in them gives: as fast to train on as any other."""
    texts = [text for text in dict.fromkeys(lines(2 * count)) if text][:count]
    return [{"text": text, "label": int(WORD in text.split())} for text in texts]


def embedtune(rows: list[dict[str, Any]], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The engine's own steps, with its log, without scoring and checkpoints."""
    from embedtune.fit.objectives.classify import prepare_classify
    from embedtune.recipes import Classify, Loop

    as_the_command()
    loop = Loop(batch=args.batch, lr=LR, max_steps=args.steps, epochs=1000, measure="dev_loss")
    dev = [{"text": f"a text {n}", "label": n % 2} for n in range(10)]
    ready = prepare_classify(
        Classify(train=rows, dev=dev, model=args.model, max_length=MAX_LENGTH, loop=loop), work, lambda text: None
    )
    run = engine_run(ready, work)
    stamps, losses = [], []
    forget_peak()
    run.clock = time.monotonic()
    for _ in range(args.steps):
        before = run.state.loss_sum
        run._step()
        stamps.append(time.perf_counter())
        losses.append(run.state.loss_sum - before)
    return {"stamps": stamps, "losses": losses, "precision": run.loop.precision}


def trainer(rows: list[dict[str, Any]], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """transformers' own trainer, timed by a callback at the end of every step."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from embedtune.encoder.device import has_bf16, pick_device
    from embedtune.encoder.load import find, quiet

    quiet()
    folder, best = find(args.model), args.one == "trainer-best"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
    table = Dataset.from_dict({**encoded, "labels": [row["label"] for row in rows]})
    bf16 = best and has_bf16(pick_device())
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(work / "out"), per_device_train_batch_size=args.batch, max_steps=args.steps, learning_rate=LR,
        bf16=bf16, use_cpu=not torch.cuda.is_available(), save_strategy="no",
        train_sampling_strategy="group_by_length" if best else "random",
        report_to="none", logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    made = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), args=arguments,
        train_dataset=table, data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Clock()],
    )  # fmt: skip
    forget_peak()
    made.train()
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    return {"stamps": stamps, "losses": losses, "precision": "bf16" if bf16 else "fp32"}


def one(args: argparse.Namespace) -> None:
    """One measurement; the result is the last line on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        found = (embedtune if args.one == "embedtune" else trainer)(rows_of(args.rows), args, Path(folder))
    seconds = found["stamps"][-1] - found["stamps"][UNTIMED - 1]
    steps = len(found["stamps"]) - UNTIMED
    print(json.dumps({"rows_per_second": steps * args.batch / seconds, "peak_mb": peak_mb(),
                      "precision": found["precision"], "loss": float(found["losses"][-1])}))  # fmt: skip


def measure(system: str, args: argparse.Namespace) -> dict[str, Any]:
    """A process of its own."""
    command = [sys.executable, str(SOURCE), "--one", system, "--batch", str(args.batch), "--steps", str(args.steps)]
    command += ["--rows", str(args.rows), "--model", args.model]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {system:<14} {found['rows_per_second']:8.2f} rows/s {found['peak_mb']:8,.0f} MB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=SYSTEMS)
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="or bert-base, modernbert: random weights")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    print(f"{date.today()}: {args.model}, batch {args.batch}, {args.steps - UNTIMED} timed steps, {args.runs} runs")
    with tempfile.TemporaryDirectory() as home:
        args.model = model_folder(args.model, Path(home))
        rounds = [{name: measure(name, args) for name in SYSTEMS} for _ in range(args.runs)]
    for name in SYSTEMS:
        print(f"{name} ({rounds[0][name]['precision']}): {told(rounds, name, 'rows_per_second', 'rows/s')}")


if __name__ == "__main__":
    main()
