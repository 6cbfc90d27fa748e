"""The end of a server: what waits is answered, and a model that hangs is ended all the same."""

import asyncio

import pytest

from embedtune.serve import app
from embedtune.serve.batcher import Limits


class Queue:
    def __init__(self, hangs):
        self.hangs, self.stopped = hangs, False

    async def stop(self):
        if self.hangs:
            await asyncio.Event().wait()
        self.stopped = True


class Model:
    closed = False

    def close(self):
        self.closed = True


@pytest.mark.parametrize("hangs", [False, True])
def test_every_model_is_closed_whether_its_queue_ends_or_not(monkeypatch, hangs):
    monkeypatch.setattr(app, "HUNG", 0.05)
    first, second = Model(), Model()
    service = app.Service(lambda: None, Limits())
    service.queues = {first: Queue(hangs), second: Queue(False)}
    asyncio.run(service.stop())
    assert first.closed and second.closed
    assert [queue.stopped for queue in service.queues.values()] == [not hangs, True]
