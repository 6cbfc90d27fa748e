"""Claim: under ten times its load the server answers as many texts as at its best, and refuses the rest at once.

A server process over --model, and connections that each ask for one text after the other:

    peak        --users of them, none refused: texts answered a second
    overload    requests offered at ten times that rate for --seconds over --connections: answered a second, refused,
                5xx, longest answer, hung; memory of the server and of its model's process before and after
    after       the users of the beginning again: rate and median time, against those of the beginning

The askers take time of the same machine. `--cores 0` keeps the server on core 0 and the askers on the others. Where
other jobs run beside it, texts a second of the server's processor time tell more than texts a second.

    python benchmarks/serve.py --seconds 60
    python benchmarks/serve.py --seconds 3 --users 8        # does it run at all?
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop

from contrastive import DATA

MAIN = "from embedtune.cli import main; main()"


class Asker(asyncio.Protocol):
    """One connection that asks and waits for the answer: as little work as can be, the server is on the same cores."""

    def __init__(self, done: Callable[[Asker, int, float], None]) -> None:
        self.done, self.transport = done, None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> None:
        self.start, self.left, self.found = time.perf_counter(), 0, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self.found:  # the head comes whole: it is one write of the server's
            self.found = data[: data.index(b"\r\n\r\n") + 4]
            self.left = int(re.search(rb"content-length: (\d+)", self.found)[1]) + len(self.found)
        self.left -= len(data)
        if self.left <= 0:
            self.done(self, int(self.found[9:12]), time.perf_counter() - self.start)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None


def request(text: str) -> bytes:
    body = json.dumps({"input": text}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def connect(port: int, done: Callable[[Asker, int, float], None], count: int) -> list[Asker]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: Asker(done), "127.0.0.1", port))[1] for _ in range(count)]


async def closed(port: int, requests: list[bytes], users: int, seconds: float) -> tuple[float, float]:
    """Texts answered a second, and the median time, with users that ask one after the other."""
    times: list[float] = []
    turn = itertools.cycle(requests)

    def done(asker: Asker, status: int, took: float) -> None:
        assert status in (200, 429), status
        if status == 200:
            times.append(took)
        # A cold server may refuse: what it can do in the time that it allows is not known yet.
        asyncio.get_running_loop().call_later(0.0 if status == 200 else 0.1, again, asker)

    def again(asker: Asker) -> None:
        if asker.transport is not None:
            asker.ask(next(turn))

    askers = await connect(port, done, users)
    for asker in askers:
        asker.ask(next(turn))
    await asyncio.sleep(seconds)
    rate = len(times) / seconds
    for asker in askers:
        if asker.transport is not None:
            asker.transport.close()
    return rate, median(times)


async def opened(port: int, requests: list[bytes], rate: float, seconds: float, count: int) -> Overload:
    """`rate` requests a second are offered; where all connections wait for an answer, one is not sent."""
    seen = Overload()
    free: deque[Asker] = deque()

    def done(asker: Asker, status: int, took: float) -> None:
        seen.statuses[status] += 1
        seen.times[status == 200].append(took)
        free.append(asker)

    free += await connect(port, done, count)
    start, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - start) < seconds:
        while sent < now * rate:
            if not free:
                seen.unsent += 1
            elif (asker := free.popleft()).transport is None:
                seen.lost += 1
            else:
                asker.ask(requests[sent % len(requests)])
            sent += 1
        await asyncio.sleep(0.002)
    seen.seconds, seen.good = time.perf_counter() - start, seen.statuses[200]
    for _ in range(300):  # what hangs is counted as such
        if len(free) + seen.lost == count:
            break
        await asyncio.sleep(0.1)
    seen.hung = count - seen.lost - len(free)
    for asker in free:
        asker.transport.close()
    return seen


@dataclass
class Overload:
    """What came of requests that were offered."""

    statuses: Counter[int] = field(default_factory=Counter)
    times: dict[bool, list[float]] = field(default_factory=lambda: {True: [0.0], False: [0.0]})
    unsent: int = 0  # all connections waited
    lost: int = 0  # connections that the server closed
    hung: int = 0
    good: int = 0
    seconds: float = 0.0


def used(server: int) -> dict[str, tuple[float, int]]:
    """Seconds of processor time and resident megabytes of the server, of its model's process, and of the askers."""
    import psutil

    front = psutil.Process(server)
    named = {"front": front, "model": front.children()[0], "askers": psutil.Process()}
    return {name: (sum(each.cpu_times()[:2]), round(each.memory_info().rss / 2**20)) for name, each in named.items()}


def cost(before: dict[str, tuple[float, int]], after: dict[str, tuple[float, int]], texts: int) -> str:
    """Where the processor's time went, and texts a second of the server's: this compares runs beside other jobs too."""
    seconds = {name: after[name][0] - before[name][0] for name in after}
    spent = ", ".join(f"{name} {share:.1f} s" for name, share in seconds.items())
    return (
        f"{texts / (seconds['front'] + seconds['model']):.0f} texts a second of the server's processor time ({spent})"
    )


async def measure(port: int, process: int, args: argparse.Namespace) -> None:
    lines = (DATA / "medical" / "data.txt").read_text(encoding="utf-8").splitlines()[:2000]
    requests = [request(line) for line in lines]
    await closed(port, requests, args.users, 3)
    before, seconds = used(process), max(3, args.seconds / 4)
    peak, calm = await closed(port, requests, args.users, seconds)
    print(f"peak: {peak:.0f} texts/s, median {calm * 1000:.0f} ms, {args.users} users; "
          f"{cost(before, used(process), round(peak * seconds))}", flush=True)  # fmt: skip
    for turn in range(args.times):
        before = used(process)
        seen = await opened(port, requests, 10 * peak, args.seconds, args.connections)
        after = used(process)
        late, refused = (sorted(seen.times[good])[int(0.99 * len(seen.times[good]))] for good in (True, False))
        memory = ", ".join(f"{name} {before[name][1]} -> {after[name][1]} MB" for name in ("front", "model"))
        print(f"overload {turn + 1}, {args.connections} connections: {seen.good / seen.seconds:.0f} texts/s answered "
              f"({seen.good / seen.seconds / peak:.0%} of the peak), p99 {late:.2f} s, of refusals {refused:.2f} s; "
              f"{dict(seen.statuses)}, not sent {seen.unsent}, lost {seen.lost}, hung {seen.hung}; {memory}; "
              f"{cost(before, after, seen.statuses[200])}", flush=True)  # fmt: skip
        await asyncio.sleep(2)
        again, median_after = await closed(port, requests, args.users, 3)
        print(f"two seconds after: {again:.0f} texts/s, median {median_after * 1000:.0f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--connections", type=int, default=2000, help="more than the queue holds, or none is refused")
    parser.add_argument("--times", type=int, default=1, help="overloads, one after the other")
    parser.add_argument("--cores", help="those of the server, as taskset names them; the askers take the others")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
    log = Path("benchmarks/work/serve.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", MAIN, "serve", args.model, "--port", str(port)]
    if args.cores:
        words = ["taskset", "-c", args.cores, *words]
    with log.open("w") as said:
        server = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if args.cores:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {int(core) for core in args.cores.split(",")})
    try:
        wait_until_ready(port)
        os.nice(10)  # askers are elsewhere as a rule: here they take what the server leaves
        uvloop.run(measure(port, server.pid, args))  # the askers take half the time that they take without
    finally:
        server.terminate()
        server.wait(30)


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server does not answer: see benchmarks/work/serve.log")


if __name__ == "__main__":
    main()
