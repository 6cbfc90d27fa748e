"""Claim: text becomes token rows on disk faster than by datasets.map, in memory that does not grow with the text.

Lines of general_900k, with a number at the end when they are needed again. Each system in a process of its own, one
after the other, --runs times; lines a second are counted after the imports, memory is the most that the process held.

    embedtune   read_texts and tokenize, as `embedtune fit` calls them
    map         datasets.load_dataset("text") and .map(tokenize), as they come
    batched     .map(tokenize, batched=True)

    python benchmarks/prepare.py --counts 10000 100000 1000000 --systems embedtune
    python benchmarks/prepare.py --counts 20000

Claim: training on 10 million lines starts within a minute, in memory that does not grow, and the cost is linear.

With --first-step `embedtune fit mlm FILE --max-steps 1` is started as a user would, and watched from outside: when
its text is prepared, when the first training step begins (the base was scored: the first line of log.jsonl) and when it
has ended (the first loss there), in seconds since the process was started (of processor time); and the most memory
that it held. --most-bytes lowers what counts as large, so that files of fewer lines go the same way; --plot
draws the seconds over the lines, with the straight line that fits best.

    python benchmarks/prepare.py --first-step 10000000
    python benchmarks/prepare.py --first-step 1000000 2000000 4000000 8000000 10000000 --most-bytes 1 --plot first.svg
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

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


def write(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines(count))


def fit(path: Path, out: Path, most_bytes: int | None) -> None:
    """What --first-step starts: the command line, with another idea of what is large where that is asked for."""
    from embedtune.cli import main as command

    if most_bytes is not None:
        from embedtune.fit.objectives import raw_text

        raw_text.MOST_BYTES = most_bytes
    sys.argv = ["embedtune", "fit", "mlm", str(path), "--max-steps", "1", "--out", str(out)]
    command()


MARKS = {  # where the child says so, and by which words
    "prepared": ("said.txt", "held out "),
    "first step begins": ("out.running/log.jsonl", "dev_loss"),
    "first step ended": ("out.running/log.jsonl", '"loss"'),
}


def busy(process: int) -> float:
    """Seconds of processor time that a process has taken, as Linux tells it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_step(path: Path, folder: Path, most_bytes: int | None) -> tuple[dict[str, tuple[float, float]], float]:
    """For each mark the seconds from the start of the process, and those of processor time; megabytes at most."""
    found: dict[str, tuple[float, float]] = {}
    words = [sys.executable, __file__, "--fit", str(path), str(folder / "out")]
    words += ["--most-bytes", str(most_bytes)] if most_bytes is not None else []
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (folder / "said.txt").open("w") as file:
        start = time.perf_counter()
        child = subprocess.Popen(words, stderr=file, stdout=subprocess.DEVNULL, env=env)
        while len(found) < len(MARKS) and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            for name, (place, mark) in MARKS.items():
                if name not in found and (folder / place).exists() and mark in (folder / place).read_text():
                    found[name] = time.perf_counter() - start, busy(child.pid)
            time.sleep(0.01)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = status
    if status or len(found) < len(MARKS):
        raise SystemExit((folder / "said.txt").read_text())
    shutil.rmtree(folder / "out")
    return found, used.ru_maxrss / 1024


def first_steps(counts: list[int], most_bytes: int | None, plot: Path | None, folder: Path) -> None:
    path, seconds = folder / "text.txt", []
    for count in counts:
        write(path, count)
        found, memory = first_step(path, folder, most_bytes)
        seconds.append(found["first step begins"][0])
        said = ", ".join(f"{name} {wall:.1f} s ({cpu:.1f})" for name, (wall, cpu) in found.items())
        print(f"{count:>11,} lines, {path.stat().st_size / 1e6:,.0f} MB: {said}; {memory:,.0f} MB at most", flush=True)
    if len(counts) > 2:
        slope, start = np.polyfit(counts, seconds, 1)
        fitted = start + slope * np.array(counts)
        worst = np.abs(np.array(seconds) - fitted).max() / max(seconds)
        print(f"{start:.1f} s, and {slope * 1e6:.2f} s more for each million lines; the point furthest off the line "
              f"is so by {worst:.1%} of the longest time")  # fmt: skip
        if plot:
            draw(plot, counts, seconds, fitted)


def draw(path: Path, counts: list[int], seconds: list[float], fitted: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.array(counts) / 1e6, fitted, color="0.6", label="straight line")
    axes.plot(np.array(counts) / 1e6, seconds, "o", label="measured")
    axes.set(xlabel="lines (million)", ylabel="seconds until the first training step", xlim=0, ylim=0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--systems", nargs="+", default=["embedtune", "map", "batched"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--first-step", type=int, nargs="+", metavar="LINES")
    parser.add_argument("--most-bytes", type=int, help="more text than this is tokenised on the fly")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--folder", help="where the text is written, which may need gigabytes")
    parser.add_argument("--fit", nargs=2, metavar=("FILE", "OUT"), help="used by the script itself")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "FILE"), help="used by the script itself")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]))))
        return
    if args.fit:
        fit(*map(Path, args.fit), args.most_bytes)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.first_step:
            first_steps(args.first_step, args.most_bytes, args.plot, Path(folder))
            return
        for count in args.counts:
            path = Path(folder, "text.txt")
            write(path, count)
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
