"""Claim: `embedtune embed` holds its rate and its memory whatever the number of texts.

The command itself, a process for each number of texts (lines of general_900k, the same ones first), so that start-up
is counted too. Memory is the most that the process held (ru_maxrss). A million texts are extrapolated: the seconds of
the largest count but one, then those of each text between it and the largest.

    python benchmarks/bulk.py --counts 10000 50000 100000
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contrastive import DATA
from embedtune.data.read import read_texts

MAIN = """
import resource, sys
from embedtune.cli import run
code = run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
MILLION = 1_000_000


def embedded(model: str, texts: Path, out: Path, more: list[str]) -> tuple[float, float, str]:
    """Seconds and most megabytes of one command, and what it says of its own rate."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MAIN, "embed", model, str(texts), "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(done.stderr)
    *said, memory = done.stderr.strip().splitlines()
    return time.perf_counter() - start, int(memory) / 1024, said[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 50_000, 100_000])
    parser.add_argument("--precision", help="bf16 or fp32; the command's own choice without it")
    args = parser.parse_args()
    lines = (row.values["text"].replace("\n", " ") for row in read_texts(DATA / "general_900k", bad_rows="skip"))
    texts = list(itertools.islice(lines, max(args.counts)))
    seconds, more = [], ["--precision", args.precision] if args.precision else []
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(args.counts):
            path = Path(folder, "texts.txt")
            path.write_text("\n".join(texts[:count]) + "\n", encoding="utf-8")
            took, memory, said = embedded(args.model, path, Path(folder, f"{count}.npy"), more)
            seconds.append((count, took))
            print(f"{count:>9,} texts: {took:7.1f} s, {memory:6,.0f} MB at most; {said}", flush=True)
    if len(seconds) > 1:
        (few, short), (many, long) = seconds[-2:]
        each = (long - short) / (many - few)
        total = short + each * (MILLION - few)
        print(f"a million texts: {total / 60:.1f} minutes, at {1 / each:,.0f} texts/s after the start")


if __name__ == "__main__":
    main()
