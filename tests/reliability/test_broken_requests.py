"""The server under what no client of good will does, and under a great deal of what they do: it answers, and grows not.

What each single thing is answered with stands in tests/serve; here it is masses of them, over real sockets.
"""

import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from reliability import ledger  # noqa: E402
from reliability.fuzz import changed  # noqa: E402
from reliability.test_parsers import HTTP_WORDS, JSON_WORDS  # noqa: E402
from serve.serving import FakeModel, free_port, listening  # noqa: E402

BLOCK, BLOCKS = 5000, 20
BODY = b'{"input": ["a", "b c"]}'
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
SEEDS = [
    WHOLE,
    WHOLE * 3,  # sent without waiting for the answers
    CHUNKED + b"5\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:]),
    CHUNKED + b"%x\r\n%s\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(BODY), BODY),
    HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    HEAD + b"Content-Length: 900\r\n\r\n" + BODY,  # the rest never comes
    b"GET /metrics HTTP/1.0\r\n\r\n",
    b"GET /info?a=%00&b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n\r\n" + b'{"inputs": ["a"]}' + b"GET / HTTP/1.1\r\n\r\n",
]


@pytest.fixture
def server():
    """(port, service) of a server over a model that is none."""
    service = Service(lambda: (FakeModel(), ()), Limits())
    with listening(service) as port:
        for _ in range(3):
            assert asked(port, WHOLE) == [200]  # threads that stay are there now
        yield port, service


def asked(port, data, cut=None, polite=True):
    """The statuses of all answers on a connection of its own; a client that is not `polite` does not wait for any."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(data[:cut])
            if cut is not None:
                time.sleep(0.002)
                connection.sendall(data[cut:])
            if data is WHOLE:
                return [answer(connection)[0]]
            if polite:
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    found += part
        except TimeoutError:  # it hangs
            raise
        except OSError:  # it hung up
            pass
    return [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]


def answer(connection):
    """The status and the head of one answer, after all of it was read."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(65536)
        assert part, "hung up on"
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(connection.recv(min(left, 65536)))
    return int(head[9:12]), head


def held():
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def settled(expected):
    """What is held, once it is no more than expected; connections are closed a little after the answer."""
    for _ in range(600):
        if all(now <= before for now, before in zip(held(), expected)):
            break
        time.sleep(0.05)
    return held()


def attack(server, numbers):
    port, service = server
    before = held()
    for number in numbers:
        draw = random.Random(number)
        data = changed(SEEDS, [*HTTP_WORDS, *JSON_WORDS], "http", number)
        cut = draw.randrange(len(data) + 1) if draw.random() < 0.3 else None
        statuses = asked(port, data, cut, polite=draw.random() < 0.8)
        assert all(100 <= status < 500 for status in statuses), (number, statuses, data[:2000])
        if number % 10 == 0:
            assert asked(port, WHOLE) == [200], (number, data[:2000])
        ledger.count()
    assert asked(port, WHOLE) == [200]
    assert all(now <= then for now, then in zip(settled(before), before)), (held(), before)
    assert service.batcher.items == 0


@pytest.mark.target("D7")
@pytest.mark.parametrize("block", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BLOCKS))])
def test_broken_requests_are_answered_or_hung_up_on(server, block):
    """2,000 in the fast tier, 100,000 in the long one; after every tenth a good request is answered as ever."""
    attack(server, range(-2000, 0) if block is None else range(block * BLOCK, (block + 1) * BLOCK))


@pytest.mark.target("D1")
@pytest.mark.parametrize("many", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_connections_that_send_slowly_hold_up_nobody(server, many):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * many + soft), hard))
    port, _ = server
    before = held()
    slow = [socket.create_connection(("127.0.0.1", port), timeout=120) for _ in range(many)]
    for number, connection in enumerate(slow):
        connection.sendall(HEAD[: 1 + number % (len(HEAD) - 1)])
    for _ in range(20):
        assert asked(port, WHOLE) == [200]
    for connection in slow:
        assert connection.recv(100) == b"", "heads that do not end are hung up on"
        connection.close()
        ledger.count()
    assert all(now <= then for now, then in zip(settled(before), before)), (held(), before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.target("D1")
def test_a_head_that_does_not_end_behind_a_request_that_is_answered_is_not_kept():
    """It is read no further than a head may be, until the request is answered; then it is refused."""
    model = FakeModel()
    service = Service(lambda: (model, ()), Limits())
    with listening(service) as port:
        assert asked(port, WHOLE) == [200]
        model.gate.clear()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(WHOLE)
            while not model.batches[1:]:
                time.sleep(0.01)
            connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            connection.settimeout(2)
            sent = 0
            with suppress(TimeoutError):  # what is not read fills the buffers between
                while sent < 2**27:
                    sent += connection.send(b"x" * 2**16)
            assert sent < 2**25
            model.gate.set()
            connection.settimeout(60)
            found, reset = b"", False
            try:
                while part := connection.recv(2**16):
                    found += part
            except ConnectionResetError:  # what was not read takes the last answer with it
                reset = True
            assert found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1 200 ") == 1
            assert reset or b"HTTP/1.1 400 " in found
        assert asked(port, WHOLE) == [200]
    ledger.count()


@pytest.mark.target("D2")
@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_more_than_it_can_do_is_refused_with_a_time_to_come_back(times):
    """64 clients at once, each asking again whatever it hears: 200, or 429 and Retry-After; then all is as before."""
    service = Service(lambda: (FakeModel(seconds=0.01), ()), Limits(batch_tokens=64, queue_seconds=0.2))
    body = json.dumps({"input": ["some words"] * 8}).encode()
    data = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with listening(service) as port:
        asked(port, WHOLE)
        before, heard, wrong = held(), [], []

        def client():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
                    for _ in range(times):
                        connection.sendall(data)
                        status, head = answer(connection)
                        heard.append(status)
                        if status != 200:
                            assert int(head.lower().split(b"retry-after: ")[1].split(b"\r\n")[0]) >= 1
            except (AssertionError, IndexError, OSError) as error:
                wrong.append(error)

        threads = [threading.Thread(target=client) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(heard) == 64 * times and set(heard) == {200, 429}
        ledger.count(len(heard))
        assert asked(port, WHOLE) == [200] and service.batcher.items == 0 == service.batcher.waiting
        assert all(now <= then for now, then in zip(settled(before), before)), (held(), before)


@pytest.mark.target("D8")
@pytest.mark.parametrize("requests", [800, *(pytest.param(n, marks=pytest.mark.slow) for n in (100_000, 700_000))])
def test_a_server_that_has_answered_much_holds_no_more_than_before(tiny_model, requests):
    """Texts of all lengths, from four clients: memory, open files and threads of both of its processes stay level."""
    import psutil

    port = free_port()
    words = ["-m", "embedtune", "serve", str(tiny_model("minilm")), "--port", str(port)]
    quiet = {**os.environ, "EMBEDTUNE_API_KEY": ""}
    process = subprocess.Popen([sys.executable, *words], env=quiet, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "serves" in line:
                break
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]

        def work(client, count):
            draw = random.Random(client)
            with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
                for _ in range(count):
                    words = [draw.choice(("bade", "fima", "lora")) for _ in range(draw.randint(1, 120))]
                    body = json.dumps({"input": " ".join(words)}).encode()
                    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                    statuses.append(answer(connection)[0])

        def load(count, seed):
            threads = [threading.Thread(target=work, args=(4 * seed + n, count // 4)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [(each.memory_info().rss, each.num_fds(), each.num_threads()) for each in family]

        statuses: list[int] = []
        warm, found = load(requests // 2, 0), load(requests, 1)
        assert set(statuses) == {200} and len(statuses) == requests + requests // 2
        ledger.count(len(statuses))
        grown = [(now[0] - then[0]) / 2**20 for now, then in zip(found, warm)]
        ledger.remark(f"D8: {requests:,} requests more: {', '.join(f'{mb:+.1f} MB' for mb in grown)} of its processes")
        assert sum(grown) < 16 + 5 * requests / 100_000, grown
        # A connection that ended a moment ago may still be open.
        assert all(now[1] <= then[1] + 4 and now[2] <= then[2] for now, then in zip(found, warm)), (warm, found)
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()
