"""Claim: Ray's workers embed as fast together as each does alone, and give the vectors of one process.

One process, then so many workers, on the same texts; models are open before the clock starts. Workers have one thread
each, and so has the one process here.

    python benchmarks/spread.py --data scifact/corpus.jsonl --texts 4096 --workers 1 2
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from embedtune.data.example import docstrings
from embedtune.data.read import read_rows
from embedtune.encoder.embed import Embedded
from embedtune.encoder.encode import identity, open_encoder, stream
from embedtune.encoder.load import find
from embedtune.search import spread


def texts_of(data: str | None, count: int) -> list[str]:
    if data is None:
        return [text for text in docstrings(4 * count) if text][:count]
    return [row.values["text"] for row in itertools.islice(read_rows(data), count)]


def timed(parts: Iterable[Embedded]) -> tuple[np.ndarray, int, float]:
    """Vectors, tokens and seconds."""
    start, found = time.perf_counter(), list(parts)
    seconds = time.perf_counter() - start
    return np.concatenate([part.vectors for part in found]), sum(int(part.tokens.sum()) for part in found), seconds


def runs(name: str, texts: list[str], workers: list[int]) -> Iterator[tuple[str, int, np.ndarray, int, float]]:
    encoder = open_encoder(name)
    yield "one process", 1, *timed(stream(encoder, texts))
    with spread.cluster() as ray:
        for many in workers:
            made = spread.start(ray, spread.Model(name, identity(name)), many, lambda said: None)
            yield f"Ray, {many} workers", many, *timed(spread.spread(ray, made, texts))
            for worker in made:
                ray.kill(worker)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--data", help="texts; without it docstrings of installed packages")
    parser.add_argument("--texts", type=int, default=8192)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = texts_of(args.data, args.texts)
    print(f"{len(texts):,} texts, {args.model}, one thread each, torch {torch.__version__}")
    first: np.ndarray | None = None
    for what, many, vectors, tokens, seconds in runs(str(find(args.model)), texts, args.workers):
        first = vectors if first is None else first
        apart = float(np.abs(first - vectors).max())
        print(f"{what:<16} {len(texts) / seconds:8,.1f} texts/s {tokens / seconds:10,.0f} tokens/s   "
              f"per worker {len(texts) / seconds / many:8,.1f} texts/s   "
              f"largest difference {apart:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
