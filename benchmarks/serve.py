"""Claim: under ten times its load the server answers as many texts as at its best, and refuses the rest at once.

A server process over --model, and users that each ask for one text after the other:

    peak        --users users, none of them refused: texts answered a second
    overload    requests offered at ten times that rate for --seconds: answered a second, refused, 5xx, longest answer
    after       the users of the beginning again: median time of an answer, against that of the beginning

    python benchmarks/serve.py --seconds 60
    python benchmarks/serve.py --seconds 3 --users 8        # does it run at all?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

from contrastive import DATA

MAIN = "from embedtune.cli import main; main()"
CONNECTIONS = 2000  # more than the queue holds, or nothing would be refused


class User:
    """One connection that asks and waits for the answer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes) -> tuple[int, float]:
        """(status, seconds)."""
        start = time.perf_counter()
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        self.writer.write(f"{head}\r\n\r\n".encode() + body)
        found = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(found.split("content-length: ")[1].split("\r\n")[0])
        await self.reader.readexactly(length)
        if "connection: close" in found:
            self.writer.close()
            self.writer = None
        return int(found.split(" ")[1]), time.perf_counter() - start


async def closed(port: int, bodies: list[bytes], users: int, seconds: float) -> tuple[float, float]:
    """Texts answered a second, and the median time, with users that ask one after the other."""
    end, times = time.perf_counter() + seconds, []

    async def one(number: int) -> None:
        user, turn = User(port), number
        while time.perf_counter() < end:
            status, took = await user.ask(bodies[turn % len(bodies)])
            turn += users
            if status == 200:
                times.append(took)

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(users)))
    return len(times) / (time.perf_counter() - start), median(times)


async def opened(port: int, bodies: list[bytes], rate: float, seconds: float) -> tuple[Counter, list[float], float]:
    """Statuses, times of what was answered, and seconds, where `rate` requests a second are offered."""
    statuses: Counter = Counter()
    times: list[float] = []
    free = [User(port) for _ in range(CONNECTIONS)]
    going: set[asyncio.Task] = set()

    async def one(user: User, body: bytes) -> None:
        try:
            status, took = await user.ask(body)
            statuses[status] += 1
            if status == 200:
                times.append(took)
        finally:
            free.append(user)

    start = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - start) < seconds:
        while sent < now * rate:
            if free:
                task = asyncio.create_task(one(free.pop(), bodies[sent % len(bodies)]))
                going.add(task)
                task.add_done_callback(going.discard)
            else:
                statuses["not sent: all connections wait"] += 1
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*going)
    return statuses, times, time.perf_counter() - start


def memory(process: int) -> float:
    """Resident megabytes."""
    import psutil

    return float(psutil.Process(process).memory_info().rss / 2**20)


async def measure(port: int, process: int, args: argparse.Namespace) -> None:
    lines = (DATA / "medical" / "data.txt").read_text(encoding="utf-8").splitlines()[:2000]
    bodies = [json.dumps({"input": line}).encode() for line in lines]
    await closed(port, bodies, args.users, 3)
    peak, calm = await closed(port, bodies, args.users, max(3, args.seconds / 4))
    before = memory(process)
    print(f"peak: {peak:.0f} texts/s, median {calm * 1000:.0f} ms, {args.users} users", flush=True)
    statuses, times, took = await opened(port, bodies, 10 * peak, args.seconds)
    times.sort()
    late = times[int(0.99 * len(times))] if times else float("nan")
    share = statuses[200] / took / peak
    print(f"overload: {statuses[200] / took:.0f} texts/s answered ({share:.0%} of the peak), p99 {late:.2f} s; "
          f"{dict(statuses)}; memory {before:.0f} -> {memory(process):.0f} MB", flush=True)  # fmt: skip
    await asyncio.sleep(2)
    _, again = await closed(port, bodies, args.users, 3)
    print(f"two seconds after: median {again * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=64)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
    log = Path("benchmarks/work/serve.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        server = subprocess.Popen([sys.executable, "-c", MAIN, "serve", args.model, "--port", str(port)],
                                  stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        for _ in range(600):
            try:
                if asyncio.run(User(port).ask(b'{"input": "hello"}'))[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        asyncio.run(measure(port, server.pid, args))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
