"""Claim: with a handful of labels a class, the way that embedtune recommends is the best of those it has.

Texts drawn from Rotten Tomatoes and banking77, so many of each class, judged on the public test rows (at most
--test-rows). Each way is made by the product's own commands, with their defaults:

    probe      fit classify --freeze: the encoder stays as it is
    tune       fit classify: all weights, the head started at a probe
    contrast   data pairs --generators labels, fit scored on them, then the probe on the adapted encoder
    augment    data augment (swap, deletion: two copies of each), then tune

    python benchmarks/few_labels.py --sets rotten_tomatoes --shots 8 16 64 --seeds 0 1 2

What is finished is kept in --work, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np

from embedtune import keyed
from embedtune.cli import run
from embedtune.data.labels import read_labelled
from embedtune.encoder import heads
from embedtune.enrich.write import write_rows
from embedtune.judge.compare import mean_interval
from embedtune.judge.heads import judge_classifier
from labels import Rows, drawn, parts

WAYS = ("probe", "tune", "contrast", "augment")
LEAST_STEPS = 100  # a handful of rows would give three
MOST_PAIRS = 6_400  # or what one for each row gives


def shots(rows: Rows, count: int, seed: int) -> Rows:
    """So many rows of each class."""
    place = np.argsort(keyed.key(seed, 21, np.arange(len(rows))), kind="stable")
    taken: dict[str, int] = {}
    chosen = []
    for i in place.tolist():
        label = str(rows[i]["label"])
        if taken.get(label, 0) < count:
            taken[label] = taken.get(label, 0) + 1
            chosen.append(rows[i])
    return chosen


def command(*words: object) -> None:
    """One command of the product, in this process: importing torch takes longer than training on eight rows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run([str(word) for word in words])
    if code:
        raise SystemExit(said.getvalue())


def long(rows: Path, epochs: int) -> list[object]:
    """So many epochs, or LEAST_STEPS steps where these are more."""
    return ["--epochs", max(epochs, -(-LEAST_STEPS // -(-sum(1 for _ in rows.open()) // 32)))]


def trained(way: str, train: Path, out: Path, seed: int) -> Path:
    """The folder that a way makes of training rows."""
    fit = ["--seed", seed, "--out", out, "--discard", "--force"]
    match way:
        case "probe":
            command("fit", "classify", train, *fit, "--freeze")
        case "tune":
            command("fit", "classify", train, *fit, *long(train, 3))
        case "augment":
            more = train.with_suffix(".augmented.jsonl")
            command("data", "augment", train, "--out", more, "--seed", seed, "--force")
            command("fit", "classify", more, *fit, *long(more, 2))
        case "contrast":
            pairs, adapted = train.with_suffix(".pairs.jsonl"), out.with_name(out.name + "-adapted")
            each = min(10, max(1, MOST_PAIRS // sum(1 for _ in train.open())))
            command("data", "pairs", train, "--generators", "labels", "--per-document", each, "--out", pairs, "--force")
            command("fit", "scored", pairs, "--loss", "CosineSimilarityLoss", *long(pairs, 1), "--batch", 32,
                    "--dev", pairs, "--allow-leaks", "--seed", seed, "--out", adapted, "--discard",
                    "--force")  # fmt: skip
            command("fit", "classify", train, *fit, "--freeze", "--model", adapted)
    return out


def judged(name: str, count: int, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """For each way which of the test rows it gets right, (n,) 0 or 1."""
    found = parts(name)
    train = args.work / f"few-{name}-{count}-{seed}.jsonl"
    test = args.work / f"few-{name}-test-{args.test_rows}.jsonl"
    write_rows(train, shots(found["train"], count, seed))
    write_rows(test, drawn(found["test"], args.test_rows))
    right = {}
    for way in args.ways:
        out = args.work / f"few-{name}-{count}-{seed}-{way}"
        kept = Path(f"{out}-{args.test_rows}.json")
        if not kept.exists():
            loaded, _ = heads.open_head(trained(way, train, out, seed))
            report = judge_classifier(loaded, list(read_labelled(test)), name, way)
            kept.write_text(json.dumps((report.predicted.argmax(1) == report.gold).astype(int).tolist()))
            shutil.rmtree(out)
            shutil.rmtree(out.with_name(out.name + "-adapted"), ignore_errors=True)
        right[way] = np.array(json.loads(kept.read_text()))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--sets", nargs="+", default=["rotten_tomatoes", "banking77"])
    parser.add_argument("--shots", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--test-rows", type=int, default=1000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        for count in args.shots:
            by_seed = [judged(name, count, seed, args) for seed in args.seeds]
            right = {way: np.mean([found[way] for found in by_seed], 0) for way in args.ways}  # (n,), over the seeds
            best = max(right, key=lambda way: right[way].mean())
            for way, values in right.items():
                low, high = mean_interval(values, np.ones(len(values)))
                gap = mean_interval(values - right[best], np.ones(len(values))) if way != best else (0.0, 0.0)
                print(f"{name}, {count} a class, {way}: accuracy {values.mean():.4f} ({low:.4f} to {high:.4f}); "
                      f"less the best, {best}: {(values - right[best]).mean():+.4f} ({gap[0]:+.4f} to {gap[1]:+.4f})",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
