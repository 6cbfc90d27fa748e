"""Claim: a run that goes on with new data and a replay of the old learns the new and forgets less of the old.

MedQuAD's questions and answers, parted by where they come from: the old ones are of genetic conditions, the new ones
of cancer. A model is tuned on the old, then goes on with the new, with and without replay; beside it one that starts
again on both. All are judged on test questions of both kinds, which no training and no dev set has seen, each kind
among its own answers.

    python benchmarks/continue.py                 # a few minutes on two quiet cores
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from contrastive import DATA
from embedtune import Contrastive, Loop, continued, finetune, keyed
from embedtune.data.pairs import read_pairs
from embedtune.data.retrieval import RetrievalSet, from_pairs
from embedtune.encoder.encode import open_encoder
from embedtune.enrich.write import write_rows
from embedtune.judge import compare
from embedtune.judge.retrieval import judge_retrieval

SOURCES = {"old": "GHR", "new": "CancerGov"}
MEASURE = "nDCG@10"
Rows = list[dict[str, Any]]


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
    parser.add_argument("--old-rows", type=int, default=800)
    parser.add_argument("--new-rows", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, default=2.0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="continue-"))
    tests: dict[str, RetrievalSet] = {}
    for kind, source in SOURCES.items():
        train, test = rows_of(source, getattr(args, f"{kind}_rows"), args.test_rows)
        write_rows(work / f"{kind}.jsonl", train)
        tests[kind] = from_pairs(read_pairs(test), kind)
        print(f"{kind} ({source}): {len(train):,} pairs to train on, {len(tests[kind].queries):,} to judge on")
    write_rows(work / "both.jsonl", [row for kind in SOURCES for row in lines(work / f"{kind}.jsonl")])
    loop = Loop(lr=args.lr, epochs=args.epochs, eval_steps=10)
    first = Contrastive(train=str(work / "old.jsonl"), max_length=128, train_length=64, dev_corpus=500, loop=loop)
    old = work / "on the old"
    recipes = {
        "on the old": first,
        "then the new, no replay": lambda: on(old, work, 0.0, loop),
        "then the new, replay 0.5": lambda: on(old, work, 0.5, loop),
        "then the new, replay 2": lambda: on(old, work, 2.0, loop),
        "on both, anew": dataclasses.replace(first, train=str(work / "both.jsonl")),
    }
    print("\n| model | old | new | old, against the first | new, against the first | verdict on dev | seconds |")
    print("|---|---|---|---|---|---|---|")
    reports = {kind: {"base": judged("all-MiniLM-L6-v2", data)} for kind, data in tests.items()}
    for name, recipe in recipes.items():
        start = time.perf_counter()
        done = finetune(recipe() if callable(recipe) else recipe, work / name)
        seconds = time.perf_counter() - start
        for kind, data in tests.items():
            reports[kind][name] = judged(str(done.folder), data)
        print(line(name, reports, f"{done.scores.get('word') or '-'} | {seconds:.0f}"), flush=True)
    print(line("base", reports, "- | -"))
    shutil.rmtree(work)


def on(old: Path, work: Path, replay: float, loop: Loop) -> Contrastive:
    """The recipe that goes on with the new pairs."""
    recipe = continued(old, str(work / "new.jsonl"), replay=replay)
    return dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, eval_steps=loop.eval_steps))


def lines(path: Path) -> Rows:
    """The rows of a file."""
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def judged(name: str, data: RetrievalSet) -> Any:
    """A report of one model."""
    return judge_retrieval(open_encoder(name), data, [MEASURE])[0]


def line(name: str, reports: dict[str, dict[str, Any]], rest: str) -> str:
    """A row of the table: the measure on both, and the changes against the run on the old pairs."""
    cells = [f"{found[name].summary[MEASURE]:.4f}" for found in reports.values()]
    for found in reports.values():
        change = compare.paired(found["on the old"], found[name], MEASURE)
        cells.append("-" if name == "on the old" else f"{change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f})")
    return f"| {name} | {' | '.join(cells)} | {rest} |"


if __name__ == "__main__":
    main()
