"""Clients that hang up while the model is busy: what they had waiting is not computed, and nothing of them is left."""

import asyncio
import json
import random
import socket
import struct
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from reliability import ledger  # noqa: E402
from reliability.test_broken_requests import answer, held  # noqa: E402
from serve.serving import FakeModel, listening  # noqa: E402

ROUND = 100  # clients that leave before it is looked at what they left
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: to close is to reset the connection
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


class Noting(FakeModel):
    """Remembers the texts that it was given."""

    def __init__(self, **given):
        super().__init__(**given)
        self.seen = []

    def compute(self, given):
        self.seen += [each.content for each in given]
        return super().compute(given)


def request(draw, name):
    """A whole request for one to five texts of this name."""
    path, field = draw.choice([("/v1/embeddings", "input"), ("/embed", "inputs")])
    body = json.dumps({field: [f"{name} {n}" for n in range(draw.randint(1, 5))]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode(), body


def pieces(draw, name):
    """What a client sends before it leaves, in one piece or with a pause between two."""
    head, body = request(draw, name)
    more = b"".join(request(draw, name))
    whole, cut = head + body, draw.randrange(1, len(more))
    ways = {
        "whole": [whole],
        "in the middle of the body": [head + body[: draw.randrange(len(body))]],
        "in the middle of the body, later": [head, body[: draw.randrange(len(body))]],
        "a second request behind it": [whole + more],
        "a second request later": [whole, more],
        "two more, each later": [whole, more, more],
        "a part of a second request behind it": [whole + more[:cut]],
        "a part of a second request later": [whole, more[:cut]],
    }
    return draw.choice([*ways.values(), [whole], [whole]])


def leave(port, draw, names):
    """As many clients as there are names: each sends, and hangs up at once or some milliseconds later."""
    staying = []
    for name in names:
        connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        if draw.random() < 0.3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for number, piece in enumerate(pieces(draw, name)):
            if number:
                time.sleep(draw.random() * 0.004)
            connection.sendall(piece)
        if draw.random() < 0.5:
            connection.close()
        else:
            staying.append(connection)
    draw.shuffle(staying)
    for connection in staying:
        time.sleep(draw.random() * 0.004)
        connection.close()


def until(holds, what):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError(what())


def tasks(service):
    """How many tasks the server's event loop has."""

    async def count():
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), service.batcher._loop).result(60)


def all_gone(port, service, before):
    """Wait until the server has met all that came before this call, and holds no more than `before`."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(LIVE)
        assert answer(connection)[0] == 200

    def now():
        return tasks(service), *held()

    until(lambda: all(one <= other for one, other in zip(now(), before)), lambda: (now(), before))


def empty(service):
    """Nothing waits, nothing is computed."""
    queue = service.batcher

    def now():
        return queue.items, queue.waiting, queue.batch, queue.computing

    until(lambda: now() == (0, 0, 0, 0), now)


@pytest.mark.target("D4")
@pytest.mark.parametrize("rounds", [2, pytest.param(75, marks=pytest.mark.slow)])
def test_what_waits_for_clients_that_are_gone_is_not_computed(rounds, caplog):
    """The model computes for one who stays while a hundred come and leave: of theirs it computes nothing."""
    model = Noting()
    service = Service(lambda: (model, ()), Limits(batch_tokens=64, queue_items=10**6, queue_seconds=1e6))
    with listening(service) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as stays:
        for number in range(rounds):
            draw = random.Random(number)
            model.gate.clear()
            model.seen.clear()
            stays.sendall(b"".join(request(draw, "stays")))
            until(lambda: model.seen, lambda: "the model is not asked")
            before = tasks(service), *held()
            leave(port, draw, [f"{number}-{client}" for client in range(ROUND)])
            all_gone(port, service, before)
            assert service.batcher.items > ROUND // 2, "they had something to drop"
            model.gate.set()
            assert answer(stays)[0] == 200
            empty(service)
            assert {text.split()[0] for text in model.seen} == {"stays"}
            ledger.count(ROUND)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.target("D4")
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_the_running_batch_is_the_last_one_of_clients_that_are_gone(rounds, caplog):
    """The model never stops, and some are refused: when all are gone, one batch of theirs may still come."""
    model = Noting(seconds=0.02)
    service = Service(lambda: (model, ()), Limits(batch_tokens=64, queue_seconds=1.0))
    with listening(service) as port:
        empty(service)
        before = tasks(service), *held()
        for number in range(rounds):
            draw = random.Random(-1 - number)
            leave(port, draw, [f"{number}-{client}" for client in range(ROUND)])
            all_gone(port, service, before)
            batches = len(model.batches)
            empty(service)
            assert len(model.batches) <= batches + 1
            ledger.count(ROUND)
        assert tasks(service) == before[0]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
