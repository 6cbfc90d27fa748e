"""Claim: `embedtune fit mlm` is several times as fast as transformers' Trainer, to no worse a loss.

All systems start from one folder (all-MiniLM-L6-v2 with a fresh masked-language head), take the same token rows, 32 a
step, for the same number of steps at the same learning rates, and are scored on the same held-out rows with the same
masks by the same function in fp32. Every measurement is a process of its own, in the order a b c a b c ..., so that
noise hits all alike. Timed are training steps only (with their collation), from the end of the third to the end of
the last; counted are tokens that are not padding.

    PYTHONPATH=src python benchmarks/mlm.py             # everything: hours on two quiet cores, most for the fp32 peer
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SYSTEMS = {
    "embedtune": "embedtune, defaults (padding-free, bf16 where the hardware has it)",
    "trainer": "transformers Trainer, run_mlm's defaults (fp32, padded to the longest of the batch)",
    "trainer-best": "transformers Trainer, at its best (bf16, grouped by length, special-token masks made beforehand)",
    "trainer-best-no-attention-dropout": "the same without dropout on attention probabilities, as embedtune has it",
}
CORPORA = {"medical": "medical/data.txt", "mixed": "general_900k/data.txt.zst"}
BATCH, LR, WARMUP, DECAY, MAX_LENGTH = 32, 5e-5, 0.05, 0.01, 256
UNTIMED = 3  # steps before the clock starts
SOURCE = Path(__file__).resolve()


# ---------------------------------------------------------------- what every process shares


def lines_of(corpus: str, count: int) -> Iterator[str]:
    """The first `count` lines of a corpus, read as a stream."""
    path = Path(os.environ.get("EMBEDTUNE_TEST_DATA", SOURCE.parents[2] / "shared" / "data")) / CORPORA[corpus]
    if not path.is_file():
        raise SystemExit(f"{path} is not there; EMBEDTUNE_TEST_DATA names the folder of the test data")
    with open(path, "rb") as raw:
        if path.suffix == ".zst":
            import io

            import zstandard

            text: Any = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        else:
            text = (line.decode() for line in raw)
        yield from itertools.islice(text, count)


def prepared(work: Path, home: Path, dev_rows: int, steps: int, model: str | None = None) -> Any:
    """embedtune's own preparation of the corpus in `work`: the same rows and the same split in every process."""
    from embedtune.encoder.load import quiet
    from embedtune.fit.objectives.prepare import prepare_mlm
    from embedtune.recipes import MLM, Loop

    quiet()
    loop = Loop(batch=BATCH, lr=LR, warmup=WARMUP, weight_decay=DECAY, max_steps=steps, epochs=1000)
    recipe = MLM(
        train=str(work / "text.txt"), model=model or str(work / "start"), max_length=MAX_LENGTH, dev_rows=dev_rows,
        mask_rate=0.15, loop=loop,
    )  # fmt: skip
    return prepare_mlm(recipe, home, lambda text: None)


def fingerprint(tokens: Any, rows: np.ndarray) -> int:
    """A number that is the same exactly if the token rows are."""
    return zlib.crc32(b"".join(tokens.row(number).astype(np.int64).tobytes() for number in rows))


def forget_peak() -> None:
    """Start `peak_mb` anew: what tokenising, splitting and building a dataset took is not the training's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The most memory this process has held since `forget_peak`. VmHWM, because ru_maxrss starts at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def result(stamps: list[float], counts: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    """One measurement, from the end of every step and its (real tokens, positions computed)."""
    timed = counts[UNTIMED : len(stamps)]
    return {
        "tokens": sum(real for real, _ in timed),
        "positions": sum(all_of for _, all_of in timed),
        "seconds": stamps[-1] - stamps[UNTIMED - 1],
        "steps": len(timed),
        "peak_mb": peak_mb(),
        **more,
    }


# ---------------------------------------------------------------- one measurement each


def prepare(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the starting folder and the token rows that all systems share; tell what they are."""
    from ceiling import flops_per_token
    from embedtune.fit.derive import widths
    from steps import model_folder

    start = work / "start"
    start.mkdir()
    # The head that all start from is fresh but for its bias, which knows how often each token occurs.
    model = model_folder(args.model, work / "random")
    prepared(work, work / "base", args.dev_rows, args.quality_steps, model).objective.save(start)
    ready = prepared(work, work / "rows", args.dev_rows, args.quality_steps)
    objective = ready.objective
    if objective.head_steps or objective.loaded.padded:
        raise SystemExit("the starting folder should have a head, and its model should run padding-free")
    train = objective.train.whole()
    np.save(work / "train.npy", train)
    lengths = objective.tokens.lengths()[train]
    masked = objective.rate * (1 - objective.tokens.affix * len(lengths) / lengths.sum())

    return {
        "rows": len(lengths),
        "dev_rows": len(objective.dev),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "widths": widths(objective.model.config),
        "flops_per_token": flops_per_token(objective.model.config, masked, (lengths**2).sum() / lengths.sum()),
        "dev": objective.score() if args.quality_steps else None,
        "train_rows": fingerprint(objective.tokens, train),
        "held_out": fingerprint(objective.dev_tokens, objective.dev),
    }


def ours(work: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """Our objective and the engine's run over it, ready for the first step."""
    from steps import engine_run

    home = Path(tempfile.mkdtemp(dir=work))
    ready = prepared(work, home, args.dev_rows, args.steps)
    # The seed of the data order alone: split, masks and dropout tables stay those of the recipe.
    loop = dataclasses.replace(ready.recipe.loop, seed=args.seed)
    run = engine_run(dataclasses.replace(ready, recipe=dataclasses.replace(ready.recipe, loop=loop)), home)
    return ready, run


def embedtune(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """(a): the engine's own steps, with its log, without scoring and checkpoints."""
    from steps import as_the_command

    as_the_command()
    ready, run = ours(work, args)
    objective, stamps, counts = ready.objective, [], []
    forget_peak()
    run.clock = time.monotonic()
    for number in range(1, args.steps + 1):
        before = run.state.tokens
        run._step()
        if number % run.loop.log_steps == 0:
            run._log()
        stamps.append(time.perf_counter())
        counts.append((run.state.tokens - before, run.state.tokens - before))
    found = result(stamps, counts, train_rows=fingerprint(objective.tokens, objective.train.whole()))
    run.optimizer.release()
    return {**found, "precision": run.loop.precision, "max_tokens": run.state.max_tokens, **score(objective, args)}


def score(objective: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Dev measures of the fp32 weights now in `objective`, where they are wanted."""
    if not args.score:
        return {}
    return {"dev": objective.score(), "held_out": fingerprint(objective.dev_tokens, objective.dev)}


def trainer(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """(b), (c): transformers' Trainer on the same rows."""
    import transformers
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from embedtune.data.tokens import open_tokens

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokens, train = open_tokens(work / "rows" / "data" / "train"), np.load(work / "train.npy")
    tokenizer = AutoTokenizer.from_pretrained(work / "start")
    changed = {"attention_probs_dropout_prob": 0.0} if args.one.endswith("no-attention-dropout") else {}
    model = AutoModelForMaskedLM.from_pretrained(work / "start", **changed)
    stamps, counts = [], []
    built = build_trainer(model, tokenizer, dataset(tokens, train, tokenizer), work, args, stamps, counts)
    forget_peak()
    built.train()
    if len(stamps) != args.steps:
        raise SystemExit(f"the Trainer took {len(stamps)} steps, not {args.steps}")
    precision = "bf16" if built.args.bf16 else "fp32"
    found = result(stamps, counts, train_rows=fingerprint(tokens, train), precision=precision)
    if not args.score:
        return found
    objective = prepared(work, Path(tempfile.mkdtemp(dir=work)), args.dev_rows, args.steps).objective
    objective.model.load_state_dict(model.state_dict())
    return {**found, **score(objective, args)}


def dataset(tokens: Any, train: np.ndarray, tokenizer: Any) -> Any:
    """The token rows as run_mlm's tokenisation would leave them (line by line, nothing to truncate)."""
    from datasets import Dataset

    special = np.array(tokenizer.all_special_ids)
    rows = [tokens.row(number) for number in train]
    return Dataset.from_dict(
        {
            "input_ids": [row.tolist() for row in rows],
            "attention_mask": [[1] * len(row) for row in rows],
            "special_tokens_mask": [np.isin(row, special).astype(int).tolist() for row in rows],
        }
    )


def build_trainer(
    model: Any,
    tokenizer: Any,
    rows: Any,
    work: Path,
    args: argparse.Namespace,
    stamps: list[float],
    counts: list[tuple[int, int]],
) -> Any:
    """A Trainer that fills `stamps` at every step's end and `counts` at every batch."""
    import torch
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    from embedtune.encoder.device import has_bf16

    class Clock(TrainerCallback):
        def on_step_end(self, *positional: Any, **named: Any) -> None:
            stamps.append(time.perf_counter())

    class Grouped(Trainer):
        """In a short timing run: batches of the stock length-grouped sampler, spread evenly over their lengths.

        It sorts 1,600 rows at a time, longest first, so that its first 20 batches alone would be the longest ones.
        """

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            order = list(super()._get_train_sampler(train_dataset))
            return order if args.score else spread(order, args.steps, args.seed)

    stock = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15)

    def collate(examples: list) -> Any:
        batch = stock(examples)
        counts.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch

    best: dict[str, Any] = {}
    if args.one != "trainer":
        # Without remove_unused_columns=False the Trainer drops special_tokens_mask (the model's forward has no such
        # argument) and the collator finds special tokens again row by row, in Python. A `length` column would be
        # dropped as well, before the sampler could read it: it measures input_ids itself, once, before training.
        best = {
            "bf16": has_bf16(torch.device("cpu")),
            "train_sampling_strategy": "group_by_length",
            "remove_unused_columns": False,
        }
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=work), use_cpu=True, max_steps=args.steps, per_device_train_batch_size=BATCH,
        learning_rate=LR, lr_scheduler_type="linear", warmup_steps=WARMUP, weight_decay=DECAY, seed=args.seed,
        save_strategy="no", report_to="none", disable_tqdm=True, **best,
    )  # fmt: skip
    kind = Grouped if best else Trainer
    return kind(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collate,
        callbacks=[Clock()],
    )  # fmt: skip


def spread(order: list[int], steps: int, seed: int) -> list[int]:
    """`steps` whole batches out of `order`, evenly spaced in its first group of 50, shuffled; then the rest."""
    batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    groups = -(-steps // 50)
    pool = batches[: max(steps, 50 * groups)]
    chosen = ((np.arange(steps) + 0.5) * len(pool) / steps).astype(int)
    np.random.default_rng(seed).shuffle(chosen)
    return [row for number in chosen for row in pool[number]]


# ---------------------------------------------------------------- the parent


def child(name: str, work: Path, args: argparse.Namespace, steps: int, seed: int = 0, score: bool = False) -> dict:
    """Run one measurement in a process of its own and read its last line."""
    words = [sys.executable, str(SOURCE), "--one", name, "--work", str(work), "--steps", steps, "--seed", seed]
    words += ["--model", args.model, "--dev-rows", args.dev_rows, "--quality-steps", args.quality_steps]
    words += ["--score"] if score else []
    env = {"HF_HUB_OFFLINE": "1", **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if name == "embedtune":
        # As our command line does it (cli.run); the peers keep the environment they find.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.setdefault("TOKENIZERS_PARALLELISM", "true")
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}{done.stdout[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "tokens" in found:
        rate = found["tokens"] / found["seconds"]
        print(f"  {name:34} seed {seed} {rate:8,.0f} tokens/s {found.get('dev', '')}", file=sys.stderr, flush=True)
    return found


def ceiling(hidden: int, inner: int) -> dict[str, float]:
    """The machine's matrix-product rates at a model's widths, measured in a process of their own."""
    words = [sys.executable, str(SOURCE.with_name("ceiling.py")), "--json"]
    words += ["--hidden", str(hidden), "--inner", str(inner)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def corpus_folder(work: Path, corpus: str, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder of a corpus, with its text, the starting model and the token rows in it."""
    folder = work / corpus
    folder.mkdir(parents=True)
    with open(folder / "text.txt", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines_of(corpus, args.lines))
    return folder, child("prepare", folder, args, args.steps)


def measure(folder: Path, about: dict[str, Any], args: argparse.Namespace) -> tuple[dict, dict]:
    """Per system the timing runs, alternating, and then the one long run for the loss."""
    timing: dict[str, list[dict]] = {name: [] for name in args.systems}
    for seed in range(args.repeats):
        for name in args.systems:
            timing[name].append(child(name, folder, args, args.steps + UNTIMED, seed))
    quality = {}
    if args.quality_steps:
        quality = {name: child(name, folder, args, args.quality_steps, score=True) for name in args.systems}
    for found in (*itertools.chain(*timing.values()), *quality.values()):
        if found["train_rows"] != about["train_rows"] or found.get("held_out", about["held_out"]) != about["held_out"]:
            raise SystemExit("the systems did not see the same rows")
    return timing, quality


def table(corpus: str, about: dict, timing: dict, quality: dict, rates: dict, args: argparse.Namespace) -> str:
    """The Markdown block of one corpus."""
    top = max(rates["bf16"], rates["fp32"])
    speeds = {name: [f["tokens"] / f["seconds"] for f in found] for name, found in timing.items()}
    own = speeds.get("embedtune", [])
    lines = [
        f"### `{corpus}`: {about['rows']:,} rows of mean {about['mean']:.1f} tokens (longest {about['longest']}), "
        f"{about['dev_rows']:,} held out",
        "",
        "| system | precision | real tokens/s, median (min-max) | embedtune is faster by, median (min-max) | "
        "useful GFLOP/s | share of the ceiling | padding | peak RSS, MB | dev loss | dev accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in timing.items():
        speed, ratios = speeds[name], [a / b for a, b in zip(own, speeds[name])]
        useful = median(speed) * about["flops_per_token"]
        padding = 1 - sum(f["tokens"] for f in found) / sum(f["positions"] for f in found)
        dev = quality[name]["dev"] if quality else None
        faster = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if own and name != "embedtune" else "-"
        lines.append(
            f"| {name} | {found[0]['precision']} | {median(speed):,.0f} ({min(speed):,.0f}-{max(speed):,.0f}) | "
            f"{faster} | {useful / 1e9:,.0f} | {useful / top:.1%} | {padding:.1%} | "
            f"{median(f['peak_mb'] for f in found):,.0f} | "
            + (f"{dev['dev_loss']:.4f} | {dev['dev_accuracy']:.2%} |" if dev else "- | - |")
        )
    if quality:
        before = about["dev"]
        lines.append(f"| (before training) | | | | | | | | {before['dev_loss']:.4f} | {before['dev_accuracy']:.2%} |")
        long_runs = ", ".join(f"{name} {f['tokens'] / f['seconds']:,.0f}" for name, f in quality.items())
        lines += ["", f"Real tokens/s in the one run of {args.quality_steps} steps behind the losses: {long_runs}."]
    return "\n".join(lines)


def hardware() -> str:
    """What it ran on: processor, cores, the flags that matter, versions, commit, date."""
    import importlib.metadata as metadata

    text = Path("/proc/cpuinfo").read_text()
    fields = dict((part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line)
    flags = [f for f in fields.get("flags", "").split() if f.startswith("amx") or f in ("avx512_bf16", "avx512f")]
    git = ["git", "-C", str(SOURCE.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True).stdout
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"{fields.get('model name', 'unknown processor')} (family {fields.get('cpu family')}, model "
        f"{fields.get('model')}), {os.cpu_count()} cores, {' '.join(flags) or 'no AVX-512, no AMX'}; {versions}; "
        f"commit {commit}{' with changes' if changed else ''}; {date.today()}; load {os.getloadavg()[0]:.2f} at start"
    )


def compare(work: Path, args: argparse.Namespace) -> None:
    """Everything: ceiling, both corpora, and the Markdown block."""
    where = hardware()
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.2f})", file=sys.stderr)
    folders = {corpus: corpus_folder(work, corpus, args) for corpus in args.corpora}
    widths = next(iter(folders.values()))[1]["widths"]
    first, blocks = ceiling(*widths), []
    for corpus, (folder, about) in folders.items():
        print(corpus, file=sys.stderr)
        blocks.append((corpus, about, *measure(folder, about, args)))
    rates = {name: max(rate, again) for (name, rate), again in zip(first.items(), ceiling(*widths).values())}
    print(f"## Masked language modelling, {date.today()}\n\n{where}\n")
    print(
        f"{args.model}. Batch {BATCH}, lr {LR:g} linear, warm-up {WARMUP:.0%}, weight decay {DECAY:g}; {args.repeats} "
        f"runs of {args.steps} timed steps each, alternating; losses after {args.quality_steps} steps, seed 0. Ceiling "
        f"(matrix products of the model's shapes, best before and after): bf16 {rates['bf16'] / 1e9:,.0f}, "
        f"fp32 {rates['fp32'] / 1e9:,.0f} GFLOP/s; shares are of the higher one.\n"
    )
    for name in args.systems:
        print(f"- {name}: {SYSTEMS[name]}")
    for corpus, about, timing, quality in blocks:
        print("\n" + table(corpus, about, timing, quality, rates, args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS)[:3])
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="or bert-base, modernbert: random weights")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--repeats", type=int, default=5, help="timing runs per system")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run")
    parser.add_argument("--quality-steps", type=int, default=300, help="steps of the run for the loss; 0: none")
    parser.add_argument("--lines", type=int, default=20_000, help="lines taken of each corpus")
    parser.add_argument("--dev-rows", type=int, default=2000)
    parser.add_argument("--work", type=Path, help="where to put models and rows while it runs (default: /tmp)")
    parser.add_argument("--one", help="run one measurement in this process and print it as JSON; --work is its corpus")
    parser.add_argument("--seed", type=int, default=0, help="with --one: of the data order")
    parser.add_argument("--score", action="store_true", help="with --one: score the held-out rows at the end")
    args = parser.parse_args()
    if args.steps < 1 or 0 < args.quality_steps <= UNTIMED:
        parser.error(f"--steps must be at least 1, --quality-steps 0 or more than {UNTIMED} (those are not timed)")
    if args.one:
        actions = {"prepare": prepare, "embedtune": embedtune}
        print("\n" + json.dumps(actions.get(args.one, trainer)(args.work, args)))
        return
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        compare(Path(work), args)


if __name__ == "__main__":
    main()
