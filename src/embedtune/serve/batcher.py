"""Dynamic batching: requests wait in one bounded queue, one thread has them computed, and nothing else queues anywhere.

The event loop never tokenises or computes, so it can always say no; and the thread takes its next batch without the
event loop, so a flood of requests does not make the model wait. What a text costs is estimated from its length; how
many such tokens a second come out is measured, and the queue holds as many as can be answered in time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import NamedTuple

import numpy as np

CHARACTERS = 4  # of a token, roughly; the measured rate is in the same unit, so a wrong guess cancels out
SPECIAL = 2  # tokens around a text
FILLED = 2 / 3  # of queue_seconds by what waits; the rest is for the way in and out, and for batches slower than most
NEW, OLD = 0.3, 0.7  # what a new measurement of the rate counts beside the older ones
HUNG = 30.0  # seconds beyond twice what was expected, after which the model is taken to hang


class Given(NamedTuple):
    """One text or one row of token ids, with the prompt that stands before the text."""

    content: str | tuple[int, ...]
    prompt: str | None = None


class Answer(NamedTuple):
    """A vector (D,) float32, the tokens that the model read, and whether it cut the text."""

    vector: np.ndarray
    tokens: int
    cut: bool


Compute = Callable[[Sequence[Given]], Sequence[Answer | Exception]]  # in the order of what was given


class Busy(Exception):
    """The queue is full: try again in `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full, try again in {seconds:.0f} s")
        self.seconds = seconds


class Hangs(Exception):
    """The model does not answer."""


class Dead(Exception):
    """The model can answer no more: its process has ended."""


class NotFinite(Exception):
    """The model gave NaN or infinity for a text."""


class BadIds(Exception):
    """Token ids that the model does not have."""


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how much is computed at once."""

    batch_tokens: int = 6144
    queue_seconds: float = 2.0  # what would be answered later than this is not let in, but two batches may always wait
    queue_items: int = 8192
    max_length: int = 512


@dataclass(eq=False)
class _Item:
    given: Given
    cost: int
    answer: asyncio.Future[Answer]


@dataclass(eq=False)
class Batcher:
    """One queue, one thread; `start` before `ask`, `stop` at the end. Belongs to one event loop."""

    compute: Compute
    limits: Limits = field(default_factory=Limits)
    died: Callable[[], None] = lambda: None  # called in the event loop when the model can answer no more
    rate: float = 2000.0  # estimated tokens a second, measured as it goes
    waiting: int = 0  # estimated tokens in the queue
    worked: float = 0.0  # monotonic time of the last batch that came out
    batch: int = 0  # items in the batch that is being computed
    computing: int = 0  # and their estimated tokens
    alive: bool = False

    def __post_init__(self) -> None:
        self._queue: deque[_Item] = deque()
        self._changed = Condition()  # guards the queue and `waiting`
        self._thread = Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._loop = asyncio.get_running_loop()
        self.alive = True
        self._thread.start()

    async def stop(self) -> None:
        """Answer what is queued, then end."""
        while self.alive and (self._queue or self.batch):
            await asyncio.sleep(0.01)
        with self._changed:
            self.alive = False
            self._changed.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    @property
    def items(self) -> int:
        """How many texts wait."""
        return len(self._queue)

    @property
    def room(self) -> float:
        """Tokens that may wait or be computed: at the least one batch of each."""
        return max(FILLED * self.rate * self.limits.queue_seconds, 2 * self.limits.batch_tokens)

    def over(self, tokens: int, items: int) -> float:
        """Seconds until so much more can wait; 0 where it can now.

        What is larger than the whole queue is taken when nothing waits: else it could never be.
        """
        if not self._queue:
            return 0.0
        tokens += self.waiting + self.computing
        if tokens <= self.room and len(self._queue) + items <= self.limits.queue_items:
            return 0.0
        return max(1.0, (tokens - self.room) / self.rate)

    def cost(self, given: Given) -> int:
        """Tokens of a text, estimated; the model reads no more than its length."""
        content = given.content
        size = len(content) if isinstance(content, tuple) else (len(content) + len(given.prompt or "")) // CHARACTERS
        return min(self.limits.max_length, size + SPECIAL)

    async def ask(self, given: Sequence[Given]) -> list[Answer]:
        """The answers, all of them or an error: Busy at once where the queue is full, Hangs where the model hangs.

        What was let in is answered, even where the machine has become slow since (up to twice what was expected,
        and HUNG): to send it away only now would have its client come again, and cost more. Cancelling drops what has
        not been computed yet.
        """
        costs = [self.cost(each) for each in given]
        if seconds := self.over(sum(costs), len(costs)):
            raise Busy(seconds)
        patience = 2 * (self.limits.queue_seconds + (self.computing + self.waiting + sum(costs)) / self.rate)
        items = [_Item(each, cost, self._loop.create_future()) for each, cost in zip(given, costs)]
        with self._changed:
            if not self.alive:
                raise Dead("the model can answer no more")
            self._queue.extend(items)
            self.waiting += sum(costs)
            self._changed.notify()
        try:
            async with asyncio.timeout(patience + HUNG):
                return await asyncio.gather(*(item.answer for item in items))
        except TimeoutError:
            raise Hangs("the model does not answer") from None
        finally:
            for item in items:
                item.answer.cancel()

    def _work(self) -> None:
        """The thread: batch after batch. `compute` does not raise but when the model can answer no more."""
        start = time.monotonic()
        while True:
            with self._changed:
                if self.alive and not self._queue:
                    self._changed.wait_for(lambda: self._queue or not self.alive)
                    start = time.monotonic()
                if not self.alive:
                    return
                items = self._next()
                self.batch, self.computing = len(items), sum(item.cost for item in items)
            if not items:  # nobody waits for any of it any more
                continue
            try:
                answers = self.compute([item.given for item in items])
            except Exception as error:
                self._end(items, error)
                return
            self.worked = time.monotonic()
            self.rate = OLD * self.rate + NEW * self.computing / max(self.worked - start, 1e-6)
            start = self.worked  # from answer to answer: what happens in between counts too
            self._tell(list(zip(items, answers)))
            self.batch = self.computing = 0

    def _end(self, items: list[_Item], error: Exception) -> None:
        logging.getLogger("embedtune").error("the model can answer no more: %s", str(error) or type(error).__name__)
        with self._changed:
            self.alive = False
            self.waiting = self.batch = self.computing = 0
            left = [*items, *self._queue]
            self._queue.clear()  # before anyone is told: who is told looks at it
        self._tell([(item, Dead("the model can answer no more")) for item in left])
        with suppress(RuntimeError):  # the loop may have ended
            self._loop.call_soon_threadsafe(self.died)

    def _tell(self, told: Sequence[tuple[_Item, Answer | Exception]]) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, told)

    def _next(self) -> list[_Item]:
        """The oldest items that fit one batch; what nobody waits for any more is dropped."""
        items: list[_Item] = []
        cost = 0
        while self._queue:
            item = self._queue[0]
            wanted = not item.answer.done()
            if wanted and items and cost + item.cost > self.limits.batch_tokens:
                break
            self._queue.popleft()
            self.waiting -= item.cost
            if wanted:
                items.append(item)
                cost += item.cost
        return items


def _resolve(told: Sequence[tuple[_Item, Answer | Exception]]) -> None:
    for item, answer in told:
        if item.answer.done():
            continue
        if isinstance(answer, Exception):
            item.answer.set_exception(answer)
        else:
            item.answer.set_result(answer)
