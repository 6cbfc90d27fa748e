"""Claim: text becomes token rows on disk faster than by datasets.map, in memory that does not grow with the text.

Lines of general_900k, with a number at the end when they are needed again. Each system in a process of its own, one
after the other, --runs times; lines a second are counted after the imports, memory is the most that the process held.

    embedtune   read_texts and tokenize, as `embedtune fit` calls them
    map         datasets.load_dataset("text") and .map(tokenize), as they come
    batched     .map(tokenize, batched=True)

    python benchmarks/prepare.py --counts 10000 100000 1000000 --systems embedtune
    python benchmarks/prepare.py --counts 20000
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from contrastive import DATA

BASE = "all-MiniLM-L6-v2"
MAX_LENGTH = 256


def lines(count: int) -> Iterator[str]:
    """So many lines, none twice."""
    from embedtune.data.read import read_texts

    for turn in itertools.count():
        ending = f" {turn}" if turn else ""
        for row in read_texts(DATA / "general_900k", bad_rows="skip"):
            if not count:
                return
            count -= 1
            yield row.values["text"].replace("\n", " ") + ending


def ours(path: Path, folder: Path, tokenizer: Any) -> int:
    from embedtune.data.read import read_texts
    from embedtune.data.tokens import tokenize

    return tokenize(read_texts(path), tokenizer, MAX_LENGTH, folder, cut=True).lines


def mapped(path: Path, folder: Path, tokenizer: Any, batched: bool) -> int:
    import datasets

    datasets.disable_progress_bars()
    read = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=str(folder))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH))

    return len(read.map(encode, batched=batched))


def one(system: str, path: Path) -> dict[str, float]:
    """What one process does: lines, seconds after the imports, most megabytes before and after."""
    from transformers import AutoTokenizer

    from embedtune.encoder import load

    if system == "embedtune":
        import embedtune.data.tokens  # noqa: F401 - imports are not what is measured
    else:
        import datasets  # noqa: F401
    tokenizer = AutoTokenizer.from_pretrained(load.find(BASE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if system == "embedtune":
            count = ours(path, Path(folder), tokenizer)
        else:
            count = mapped(path, Path(folder), tokenizer, system == "batched")
        seconds = time.perf_counter() - start
    return {"lines": count, "seconds": seconds, "before": before,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--systems", nargs="+", default=["embedtune", "map", "batched"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "FILE"), help="used by the script itself")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            path = Path(folder, "text.txt")
            with path.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines(count))
            found: dict[str, list[dict[str, float]]] = {system: [] for system in args.systems}
            for _ in range(args.runs):
                for system in args.systems:
                    words = [sys.executable, __file__, "--one", system, str(path)]
                    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
                    done = subprocess.run(words, capture_output=True, text=True, env=env)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    found[system].append(json.loads(done.stdout.splitlines()[-1]))
            first = median(run["seconds"] for run in found[args.systems[0]])
            for system, runs in found.items():
                seconds = median(run["seconds"] for run in runs)
                memory = median(run["memory"] for run in runs)
                grown = memory - median(run["before"] for run in runs)
                print(f"{system:10} {count:>10,} lines: {count / seconds:8,.0f} lines/s, {memory:,.0f} MB at most "
                      f"({grown:,.0f} above the imports); takes {seconds / first:.2f} times as long as "
                      f"{args.systems[0]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
