"""Claim: exact float64 statistics of 850,000 x 768 float32 rows take <= 15 s of one core and < 200 MB.

Memory is what the process grows by after the first chunk is there. Rows come from a small pool; making them
is not timed. (Not called statistics.py: a script's folder is searched first, and a file of that name would
hide Python's own module from every benchmark.)
"""

import argparse
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from embedtune.refine.statistics import Statistics


def pool(rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated float32 vectors with a mean, and a two-column target."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d, d), dtype=np.float32) / d**0.5
    x = rng.standard_normal((rows, d), dtype=np.float32) @ mixing
    return x + rng.standard_normal(d, dtype=np.float32) * 5, rng.lognormal(4, 1, (rows, 2))


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=850_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=2048)
    args = parser.parse_args()

    x, z = pool(max(20_000, 2 * args.chunk), args.dimension)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that making the pool had
    before, wall, cpu, done = memory_mb("VmRSS"), 0.0, 0.0, 0
    total = Statistics.empty(args.dimension, 2)
    while done < args.rows:
        start, size = (done * 7) % (len(x) - args.chunk), min(args.chunk, args.rows - done)
        t, c = time.perf_counter(), time.process_time()
        total = total + Statistics.of(x[start : start + size], z[start : start + size], first_row=done)
        wall += time.perf_counter() - t
        cpu += time.process_time() - c
        done += size
    grown = memory_mb("VmHWM") - before
    print(f"{total.n:,} x {args.dimension} float32, chunks of {args.chunk:,}, one thread")
    print(f"seconds: {wall:.2f} wall, {cpu:.2f} of one core; peak memory growth: {grown:.0f} MB")

    exact = x.astype(np.float64)
    exact -= exact.mean(axis=0)
    exact = exact.T @ exact
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    worst = np.abs((Statistics.of(x, z).S_xx - exact) / scale).max()
    print(f"{len(x):,} rows against numpy's two passes: largest difference {worst:.1e} standard deviations^2")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
