"""Claim: a run that goes on with new data and a replay of the old learns the new and keeps the old.

banking77: the new rows are of intents that the old ones hardly have, and of no others. medquad: questions and answers,
the old of genetic conditions, the new of cancer. A model is tuned on the old, then goes on with the new, with and
without replay; beside it one that starts again on both. All are judged on test rows of both kinds that no training and
no dev set has seen. After a REGRESSION the weights are those of the first run, as a user gets them.

    python benchmarks/continue.py                 # banking77: a few minutes on two quiet cores
    python benchmarks/continue.py medquad         # ten
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from contrastive import DATA
from embedtune import Classify, Contrastive, Loop, continued, finetune, keyed
from embedtune.data.labels import Labelled, read_labelled
from embedtune.data.pairs import read_pairs
from embedtune.data.read import read_rows
from embedtune.data.retrieval import RetrievalSet, from_pairs
from embedtune.encoder import heads
from embedtune.encoder.encode import open_encoder
from embedtune.enrich.write import write_rows
from embedtune.judge import compare
from embedtune.judge.heads import judge_classifier
from embedtune.judge.retrieval import judge_retrieval

KINDS = ("old", "new")
MEASURE = "nDCG@10"
Rows = list[dict[str, Any]]
Judge = Callable[[Path, str], Any]  # of a model folder, on the test rows of a kind


def rows_of(source: str, train: int, test: int) -> tuple[Rows, Rows]:
    """Pairs of a source to train on and to judge on; a condition is on one side only, a text stands once."""
    found: dict[str, Rows] = {}
    seen: set[str] = set()
    with open(DATA / "medquad" / "medquad.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if source in row["id"] and row["answer"].strip() and not {row["question"], row["answer"]} & seen:
                seen |= {row["question"], row["answer"]}
                found.setdefault(row["focus"], []).append({"anchor": row["question"], "positive": row["answer"]})
    names = list(found)
    order = [names[n] for n in np.argsort(keyed.key(0, np.arange(len(names))), kind="stable")]
    rows = [(number, row) for number, name in enumerate(order) for row in found[name]]
    judged = [row for number, row in rows if number % 4 == 0][:test]
    return [row for number, row in rows if number % 4][:train], judged


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="banking77", choices=["banking77", "medquad"])
    parser.add_argument("--own-dev", action="store_true", help="banking77: dev rows of the frequent intents alone")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, help="default: 4 and 2")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="continue-"))
    first, measure, judged = (of_banking if args.data == "banking77" else of_medquad)(work, args.own_dev)
    loop = dataclasses.replace(first.loop, lr=args.lr, epochs=args.epochs or first.loop.epochs)
    first = dataclasses.replace(first, loop=loop)
    write_rows(work / "both.jsonl", [row for kind in KINDS for row in lines(work / f"{kind}.jsonl")])
    old = work / "on the old"
    recipes: dict[str, Callable[[], Any]] = {
        "on the old": lambda: first,
        "then the new, no replay": lambda: on(old, work, 0.0),
        "then the new, replay 0.5": lambda: on(old, work, 0.5),
        "then the new, replay 2": lambda: on(old, work, 2.0),
        "on both, anew": lambda: dataclasses.replace(first, train=str(work / "both.jsonl")),
    }
    print(f"\n| {measure} | old | new | old, against the first | new, against the first | verdict on dev | seconds |")
    print("|---|---|---|---|---|---|---|")
    found: dict[str, list[Any]] = {}
    for name, recipe in recipes.items():
        start = time.perf_counter()
        done = finetune(recipe(), work / name)
        seconds = time.perf_counter() - start
        found[name] = [judged(done.folder, kind) for kind in KINDS]
        cells = [f"{report.summary[measure]:.4f}" for report in found[name]]
        changes = [compare.paired(a, b, measure) for a, b in zip(found["on the old"], found[name], strict=True)]
        cells += [f"{c.value:+.4f} ({c.low:+.4f} to {c.high:+.4f})" if len(found) > 1 else "-" for c in changes]
        print(f"| {name} | {' | '.join(cells)} | {done.scores.get('word') or '-'} | {seconds:.0f} |", flush=True)
    shutil.rmtree(work)


def on(old: Path, work: Path, replay: float) -> Any:
    """The recipe that goes on with the new rows."""
    return continued(old, str(work / "new.jsonl"), replay=replay)


def of_medquad(work: Path, own_dev: bool) -> tuple[Any, str, Judge]:
    """Questions and answers of two sources: the recipe for the old, the measure, and how a folder is judged."""
    tests: dict[str, RetrievalSet] = {}
    for kind, (source, most) in {"old": ("GHR", 800), "new": ("CancerGov", 400)}.items():
        train, test = rows_of(source, most, 300)
        write_rows(work / f"{kind}.jsonl", train)
        tests[kind] = from_pairs(read_pairs(test), kind)
        print(f"{kind} ({source}): {len(train):,} pairs to train on, {len(tests[kind].queries):,} to judge on")
    loop = Loop(epochs=2, eval_steps=10)
    recipe = Contrastive(train=str(work / "old.jsonl"), max_length=128, train_length=64, dev_corpus=500, loop=loop)
    return recipe, MEASURE, lambda folder, kind: judge_retrieval(open_encoder(str(folder)), tests[kind], [MEASURE])[0]


def of_banking(work: Path, own_dev: bool) -> tuple[Any, str, Judge]:
    """Questions to a bank: of 39 intents the old rows have 10 each, of the others 2 each; the new have 10 of these.

    With `own_dev` the old dev rows are 5 of each of the 39; else one of each intent, in which what the new intents gain
    hides what the others lose.
    """
    sides: dict[str, Rows] = {"old": [], "new": []}
    rows: dict[str, Rows] = {}
    for row in read_rows(DATA / "banking77" / "train.csv"):
        rows.setdefault(row.values["category"], []).append(
            {"text": row.values["text"], "label": row.values["category"]}
        )
    names = sorted(rows)
    rare = set(names[1::2])
    for name in names:
        sides["old"] += rows[name][: 2 if name in rare else 10]
        sides["new"] += rows[name][2:12] if name in rare else []
    tests: dict[str, list[Labelled]] = {"old": [], "new": []}
    for text in read_labelled(DATA / "banking77" / "test.csv", columns={"label": "category"}):
        tests["new" if text.labels[0] in rare else "old"].append(text)
    for kind in KINDS:
        write_rows(work / f"{kind}.jsonl", sides[kind])
        print(f"{kind}: {len(sides[kind]):,} texts to train on, {len(tests[kind]):,} to judge on")

    def judged(folder: Path, kind: str) -> Any:
        return judge_classifier(heads.open_head(folder)[0], tests[kind], kind, str(folder))

    dev = None
    if own_dev:
        dev = str(work / "dev.jsonl")
        write_rows(Path(dev), [row for name in names if name not in rare for row in rows[name][20:25]])
    return Classify(train=str(work / "old.jsonl"), dev=dev, loop=Loop(epochs=4, eval_steps=10)), "accuracy", judged


def lines(path: Path) -> Rows:
    """The rows of a file."""
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
