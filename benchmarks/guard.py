"""Claim: no change makes the engine more than 15 % slower than the recorded ratio against its peer.

A step of masked language modelling, one of contrastive learning, and encoding, each in turns with the stock model on
the same texts (random weights' speed is that of trained ones, so all-MiniLM-L6-v2 does; bf16 where the hardware has
it; rows of like length together). One thread; what counts is the processor time of the process, and of many short
turns the middle ratio: what else the machine does fouls the caches of both alike, so that turns side by side tell more
than the least seconds of each. Hardware counters of instructions would be steadier; virtual machines seldom have them.
A measure that seems slower is taken once more.

`guard.json` holds ratios by vector extensions, for AMX favours us more than AVX2 does.

    python benchmarks/guard.py                   # exit 1 where a ratio fell; takes two minutes
    python benchmarks/guard.py --record          # write the ratios of this hardware, on a quiet machine
    python benchmarks/guard.py --self-check      # must find out that we were made 25 % slower
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

RECORD = Path(__file__).resolve().with_name("guard.json")
ALLOWED = 0.15  # slower by this much fails
SLOWED = 0.25  # in the check of the guard itself
TURNS, ROWS, LONGEST = 15, 24, 120
Turn = tuple[float, float]  # seconds of ours, and of the peer
Work = Callable[[], Any]


class Verdict(NamedTuple):
    """How many times as fast as the peer we are, and how much slower than recorded (below zero: faster)."""

    ratio: float
    slower: float
    ok: bool


def ratio_of(turns: Sequence[Turn]) -> float:
    """How many times as fast as the peer we are in the middle turn."""
    return median(peer / ours for ours, peer in turns)


def judge(turns: Sequence[Turn], recorded: float, allowed: float = ALLOWED) -> Verdict:
    """Whether we take at most (1 + `allowed`) times what the recorded ratio lets us take beside this peer."""
    ratio = ratio_of(turns)
    slower = recorded / ratio - 1
    return Verdict(ratio, slower, slower <= allowed)


def hardware_class() -> str:
    """The vector extensions that decide how fast matrix products are."""
    import torch

    for name, check in (("amx", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, check, lambda: False)():
            return name
    return torch.backends.cpu.get_cpu_capability().lower()


# ---------------------------------------------------------------- what is measured


def texts_of(tokenizer: Any, count: int, salt: int) -> list[str]:
    """Always the same texts, of 4 to LONGEST tokens, short ones more often, made of whole words of the vocabulary."""
    draw = np.random.default_rng(salt)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    lengths = np.exp(draw.uniform(np.log(4), np.log(LONGEST - 2), count)).astype(int)
    return [" ".join(draw.choice(words, length)) for length in lengths]


def training(folder: Path, home: Path) -> dict[str, tuple[Work, Work]]:
    """Steps of both objectives, of ours and of the peer."""
    from embedtune.encoder import load
    from embedtune.encoder.device import fast_precision, pick_device
    from embedtune.fit.objectives.contrastive import prepare_contrastive
    from embedtune.fit.objectives.prepare import prepare_mlm
    from embedtune.recipes import MLM, Contrastive, Loop
    from steps import engine_run, our_step, stock_contrastive, stock_mlm

    bf16 = fast_precision(pick_device()) == "bf16"
    tokenizer = load.load_tokenizer(folder)
    texts, dev = texts_of(tokenizer, ROWS, 0), texts_of(tokenizer, 12, 1)
    # A batch is all there is, so that every step takes the same rows.
    loop = Loop(batch=ROWS, max_steps=10_000, epochs=10_000, max_tokens=8192)
    recipe = MLM(train=texts, dev=dev, model=str(folder), max_length=LONGEST, head_steps=0, loop=loop)
    ready = prepare_mlm(recipe, home / "mlm", lambda text: None)
    rows = sorted((ready.objective.tokens.row(number) for number in ready.objective.train.whole()), key=len)
    ours = our_step(engine_run(ready, home / "mlm"))
    parts = 4
    grouped = [rows[first : first + ROWS // parts] for first in range(0, ROWS, ROWS // parts)]
    peer = stock_mlm(str(folder), grouped, bf16, parts=parts)
    pairs = [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    held = [{"anchor": a, "positive": b} for a, b in zip(dev[::2], dev[1::2], strict=True)]
    loop = Loop(batch=ROWS // 2, max_steps=10_000, epochs=10_000, max_tokens=8192)
    paired = Contrastive(train=pairs, dev=held, model=str(folder), max_length=LONGEST, loop=loop)
    pulled = our_step(engine_run(prepare_contrastive(paired, home / "pairs", lambda text: None), home / "pairs"))
    stock = stock_contrastive(str(folder), [pairs], LONGEST, bf16)
    return {"mlm": (lambda: ours(0), lambda: peer(0)), "contrastive": (lambda: pulled(0), lambda: stock(0))}


def encoding(folder: Path) -> tuple[Work, Work]:
    """Vectors of texts, by ours and by the peer, who sorts by length too."""
    import torch

    from embedtune.encoder.device import fast_precision, pick_device
    from embedtune.encoder.embed import embed
    from embedtune.encoder.embedder import load_embedder, load_stock

    precision = fast_precision(pick_device())
    model, _ = load_embedder(folder, precision)
    stock = load_stock(folder).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    texts = texts_of(stock.tokenizer, 4 * ROWS, 2)
    return (
        lambda: list(embed(model, texts)),
        lambda: stock.encode(texts, batch_size=ROWS, convert_to_tensor=True, show_progress_bar=False),
    )


def slowed(work: Work) -> Work:
    """The same work, and SLOWED of its processor time on top."""

    def more() -> None:
        start = time.process_time()
        work()
        end = start + (1 + SLOWED) * (time.process_time() - start)
        while time.process_time() < end:
            pass

    return more


def seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(pair: tuple[Work, Work], turns: int) -> list[Turn]:
    """Ours and the peer by turns, after one turn that does not count."""
    ours, peer = pair
    ours(), peer()
    return [(seconds(ours), seconds(peer)) for _ in range(turns)]


# ---------------------------------------------------------------- the guard


def check(name: str, pair: tuple[Work, Work], recorded: float, turns: int) -> bool:
    """One measure against its record; where it seems slower, once more."""
    found = measured(pair, turns)
    if not judge(found, recorded).ok:
        found += measured(pair, turns)
    verdict = judge(found, recorded)
    told = f"{verdict.slower:.1%} slower" if verdict.slower > 0 else f"{-verdict.slower:.1%} faster"
    print(f"{'ok    ' if verdict.ok else 'FAILED'} {name:<12} {verdict.ratio:.2f} times as fast as the peer, recorded "
          f"{recorded:.2f}: {told}, {ALLOWED:.0%} is allowed", flush=True)  # fmt: skip
    return verdict.ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--record", action="store_true", help="write the ratios of this hardware: medians of --rounds")
    parser.add_argument("--rounds", type=int, default=3, help="with --record")
    parser.add_argument("--self-check", action="store_true", help="exit 0 if the guard finds out that we were slowed")
    parser.add_argument("--file", type=Path, default=RECORD)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    records = json.loads(args.file.read_text(encoding="utf-8")) if args.file.is_file() else {}
    kind = hardware_class()
    if kind not in records and not args.record:
        print(f"warning: no ratios are recorded for {kind}, so nothing is guarded; on a quiet machine and at a commit "
              "known to be fast, `python benchmarks/guard.py --record` writes them", file=sys.stderr)  # fmt: skip
        return 0
    from embedtune.encoder import load

    load.quiet()
    folder = load.find(load.DEFAULT)
    with tempfile.TemporaryDirectory() as home:
        work = {**training(folder, Path(home)), "encode": encoding(folder)}
        if args.record:
            rounds = [{n: ratio_of(measured(pair, args.turns)) for n, pair in work.items()} for _ in range(args.rounds)]
            ratios = {name: round(median(found[name] for found in rounds), 3) for name in work}
            records[kind] = {**ratios, "torch": torch.__version__, "date": str(date.today())}
            args.file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
            print(f"{kind}: {json.dumps(records[kind])}; rounds {json.dumps(rounds)}")
            return 0
        if args.self_check:
            work = {name: (slowed(ours), peer) for name, (ours, peer) in work.items()}
        if (now := torch.__version__) != records[kind]["torch"]:
            print(f"warning: recorded with torch {records[kind]['torch']}, this is {now}", file=sys.stderr)
        passed = [check(name, pair, records[kind][name], args.turns) for name, pair in work.items()]
    if args.self_check:
        print(f"{passed.count(False)} of {len(passed)} slow-downs of {SLOWED:.0%} were found")
        return int(any(passed))
    return int(not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
