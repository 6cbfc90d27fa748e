"""Claim asked: does a penalty on length in training keep more nDCG than erasing length afterwards?

    python benchmarks/erasure_training.py --rows 2000 --steps 60
    python benchmarks/erasure_training.py --rows 400 --steps 4 --queries 40       # does it run at all?

all-MiniLM-L6-v2 on MedQuAD, no question of the test shares its topic with training. Each run ends with the erasure in
closed form; a weight of 1e-9 is no penalty, so that run is the one that erases afterwards. Same seed, same pairs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from contrastive import DATA
from embedtune import Contrastive, Loop, Ranking, finetune

NONE = 1e-9


def rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines = (DATA / "medquad" / "medquad.jsonl").read_text("utf-8").splitlines()
    table = [row for row in map(json.loads, lines) if row["answer"].strip()]
    topics = sorted({row["focus"] for row in table})
    random.Random(args.seed).shuffle(topics)
    held = set(topics[: len(topics) // 5])
    random.Random(args.seed).shuffle(table)
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in table:
        sides[row["focus"] in held].append({"anchor": row["question"], "positive": row["answer"]})
    return sides[0][: args.rows], sides[1][: args.queries]


def main(args: argparse.Namespace) -> None:
    train, dev = rows(args)
    for weight in (NONE, *args.weights):
        for alike in (False, True):
            out = args.work / f"{weight:g}-{'alike' if alike else 'mixed'}"
            if not out.is_dir():
                loop = Loop(batch=32, max_steps=args.steps, eval_steps=args.steps, seed=args.seed, lr=3e-5)
                ranking = Ranking(length_penalty=weight, like_lengths=alike)
                recipe = Contrastive(train=train, dev=dev, max_length=128, train_length=64, allow_leaks=True, loop=loop,
                                     dev_rows=args.queries, dev_corpus=2 * args.queries, ranking=ranking)  # fmt: skip
                finetune(recipe, out)
            found = json.loads((out / "scores.json").read_text())
            values = [found[name]["dev_nDCG@10"] for name in ("baseline", "before_erasure", "tuned")]
            print(f"weight {weight:g}, {'like lengths' if alike else 'mixed'}: nDCG@10 base {values[0]:.4f}, trained "
                  f"{values[1]:.4f}, erased {values[2]:.4f}; {found['erasure'][0]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("erasure-training"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 10.0])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    main(args)
