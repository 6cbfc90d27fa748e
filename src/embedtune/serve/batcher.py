"""Dynamic batching: requests wait in one bounded queue, one thread computes, and nothing else queues anywhere.

The event loop never tokenises or computes, so it can always say no. What a text costs is estimated from its length;
how many such tokens a second come out is measured, and the queue holds as many as can be answered in time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

CHARACTERS = 4  # of a token, roughly; the measured rate is in the same unit, so a wrong guess cancels out
SPECIAL = 2  # tokens around a text
NEW, OLD = 0.3, 0.7  # what a new measurement of the rate counts beside the older ones


class Given(NamedTuple):
    """One text or one row of token ids, with the prompt that stands before the text."""

    content: str | tuple[int, ...]
    prompt: str | None = None


class Answer(NamedTuple):
    """A vector (D,) float32, the tokens that the model read, and whether it cut the text."""

    vector: np.ndarray
    tokens: int
    cut: bool


Compute = Callable[[Sequence[Given]], Sequence[Answer | Exception]]


class Busy(Exception):
    """The queue is full: try again in `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full, try again in {seconds:.0f} s")
        self.seconds = seconds


class Late(Exception):
    """The answer would come after the deadline."""


class NotFinite(Exception):
    """The model gave NaN or infinity for a text."""


class BadIds(Exception):
    """Token ids that the model does not have."""


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how much is computed at once."""

    batch_tokens: int = 8192
    queue_seconds: float = 2.0  # what waits longer than this would be answered too late
    queue_items: int = 8192
    max_length: int = 512


@dataclass(eq=False)
class _Item:
    given: Given
    cost: int
    due: float
    answer: asyncio.Future[Answer]


@dataclass(eq=False)
class Batcher:
    """One queue, one thread; `start` before `ask`, `stop` at the end. Belongs to one event loop."""

    compute: Compute
    limits: Limits = field(default_factory=Limits)
    rate: float = 2000.0  # estimated tokens a second, measured as it goes
    waiting: int = 0  # estimated tokens in the queue
    worked: float = 0.0  # monotonic time of the last batch that came out
    batch: int = 0  # items in the batch that is being computed

    def __post_init__(self) -> None:
        self._queue: deque[_Item] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Answer what is queued, then end."""
        while self.alive and (self._queue or self.batch):
            await asyncio.sleep(0.01)
        for item in self._queue:  # of a worker that has died
            item.answer.cancel()
        if self._task:
            self._task.cancel()
        self._thread.shutdown(wait=True)

    @property
    def alive(self) -> bool:
        """Whether the worker still works; it only ends by a bug or for want of memory."""
        return self._task is not None and not self._task.done()

    @property
    def items(self) -> int:
        """How many texts wait."""
        return len(self._queue)

    def cost(self, given: Given) -> int:
        """Tokens of a text, estimated; the model reads no more than its length."""
        content = given.content
        size = len(content) if isinstance(content, tuple) else (len(content) + len(given.prompt or "")) // CHARACTERS
        return min(self.limits.max_length, size + SPECIAL)

    async def ask(self, given: Sequence[Given]) -> list[Answer]:
        """The answers, all of them or an error: Busy at once where the queue is full, Late where it took too long.

        Cancelling drops what has not been computed yet.
        """
        costs = [self.cost(each) for each in given]
        room = max(self.rate * self.limits.queue_seconds, self.limits.batch_tokens)
        # A request that is larger than the whole queue is taken when nothing waits: else it could never be.
        if self._queue and (
            self.waiting + sum(costs) > room or len(self._queue) + len(given) > self.limits.queue_items
        ):
            raise Busy(max(1.0, (self.waiting + sum(costs) - room) / self.rate))
        loop = asyncio.get_running_loop()
        patience = self.limits.queue_seconds + (self.waiting + sum(costs)) / self.rate
        due = time.monotonic() + 2 * patience
        items = [_Item(each, cost, due, loop.create_future()) for each, cost in zip(given, costs)]
        self._queue.extend(items)
        self.waiting += sum(costs)
        self._wake.set()
        try:
            return await asyncio.gather(*(item.answer for item in items))
        finally:
            for item in items:
                item.answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        start = 0.0
        while True:
            items = self._next()
            if not items:
                self._wake.clear()
                await self._wake.wait()
                start = time.monotonic()
                continue
            self.batch = len(items)
            answers = await loop.run_in_executor(self._thread, _guarded, self.compute, [i.given for i in items])
            self.worked, self.batch = time.monotonic(), 0
            rate = sum(item.cost for item in items) / max(self.worked - start, 1e-6)
            self.rate = OLD * self.rate + NEW * rate
            start = self.worked  # from answer to answer: what the event loop needs in between counts too
            for item, answer in zip(items, answers, strict=True):
                if item.answer.done():
                    continue
                if isinstance(answer, Exception):
                    item.answer.set_exception(answer)
                else:
                    item.answer.set_result(answer)

    def _next(self) -> list[_Item]:
        """The oldest items that fit one batch; those that nobody waits for any more are dropped."""
        items: list[_Item] = []
        cost, now = 0, time.monotonic()
        while self._queue:
            item = self._queue[0]
            wanted = not item.answer.done()
            if wanted and now <= item.due and items and cost + item.cost > self.limits.batch_tokens:
                break
            self._queue.popleft()
            self.waiting -= item.cost
            if not wanted:
                continue
            if now > item.due:
                item.answer.set_exception(Late("not answered in time"))
                continue
            items.append(item)
            cost += item.cost
        return items


def _guarded(compute: Compute, given: Sequence[Given]) -> Sequence[Answer | Exception]:
    """An error of the whole batch is the error of each; if several were in it, each is tried alone first."""
    try:
        return compute(given)
    except Exception as error:
        if len(given) == 1:
            return [error]
        return [_guarded(compute, [each])[0] for each in given]
