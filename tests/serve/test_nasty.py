"""Requests that no client of good will sends, over a real socket, and signals at bad moments."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serving import FakeModel, free_port, listening  # noqa: E402

from embedtune.serve import guard, listen  # noqa: E402
from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from embedtune.serve.shelf import open_all  # noqa: E402

SERVE = "from embedtune.cli import main; main()"


@pytest.fixture(scope="module")
def port():
    with listening(Service(lambda: (FakeModel(), ()), Limits())) as port:
        yield port


def send(port, data, wait=20.0):
    """The status of what comes back, and its body; 0 where the server hangs up without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        return answer_of(connection)


def answer_of(connection):
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(65536)
        if not part:
            return 0, b""
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head[9:12]), body


def post(body, path="/v1/embeddings", length=None, extra=""):
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{extra}\r\n"
    return head.encode() + body


FINE = post(b'{"input": "a"}')


def is_well(port):
    return send(port, FINE)[0] == 200


@pytest.mark.parametrize(("body", "status"), [
    (b'{"input": "' + b"x" * 2**20 + b'"}', 422), (b'{"input": ' + b"9" * 5000 + b"}", 400),
    (b'{"input": [1e400]}', 422), (b'{"input": NaN}', 422), (b'{"input": [NaN, Infinity]}', 422),
    (b'{"input": "a", "dimensions": NaN}', 422), (b'{"input": "a", "dimensions": 1e308}', 422),
    (b'{"input": [2147483648]}', 422), (b'{"input": [99999]}', 422), (b'{"input": "\\ud800"}', 422),
    (b'{"input": "a\\u0000b"}', 200), (b'\xef\xbb\xbf{"input": "a"}', 200), (b"\x00\xff\xfe", 400),
    (b'{"input": "a", "input": "b"}', 200), (b'{"input": "' + b"[" * 1000 + b'"}', 200), (b"null", 422),
    (b'{"input": "a", "user": "x\\r\\nSet-Cookie: a=b"}', 200), (b'{"input": "a", "model": "x\\r\\ny: z"}', 404),
    ("é".encode("utf-16"), 422), (b'{"__proto__": {}, "input": "a"}', 422),
])  # fmt: skip
def test_bodies(port, body, status):
    found, answer = send(port, post(body))
    assert found == status and (status == 200 or json.loads(answer)["error"]["message"])


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n\r\n\r\nBLAH / /\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /embed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000, b"GET /" + b"a" * 200_000,
])  # fmt: skip
def test_what_is_no_http_is_a_400_or_a_closed_connection(port, data):
    assert send(port, data)[0] in (0, 400) and is_well(port)


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/page.js/../app.py", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd",
    "/page.js%00.html", "/static/../../../etc/passwd", "/%c0%ae%c0%ae/etc/passwd", "/page.js%0d%0aSet-Cookie:%20a=b",
])  # fmt: skip
def test_paths_lead_nowhere(port, path):
    status, body = send(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status in (400, 404) and b"root:" not in body and b"Set-Cookie" not in body.split(b"{")[0]


def test_a_body_that_is_longer_or_shorter_than_it_says(port):
    # The rest is another request, and a bad one: the connection ends, with the answer to the first or without.
    assert send(port, post(b'{"input": "a"}' + b"x" * 100, length=14))[0] in (200, 400)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(post(b'{"input"', length=14))  # and then it goes away
    assert is_well(port)


def test_slow_bodies_and_slow_heads_are_hung_up_on_and_hold_up_nobody(port, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    slow = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(60)]
    for number, connection in enumerate(slow):
        connection.sendall(post(b'{"in', length=14) if number % 2 else b"POST /embed HTTP/1.1\r\nHost: x\r\nX-")
    assert is_well(port)
    for number, connection in enumerate(slow):
        assert answer_of(connection)[0] == (408 if number % 2 else 0)
        connection.close()
    assert is_well(port)


def test_only_connections_without_a_head_are_hung_up_on():
    class Connection:
        def __init__(self, cycle=None, clock=None):
            self.cycle, self.timeout_keep_alive_task, self.transport, self.closed = cycle, clock, self, False

        def close(self):
            self.closed = True

    class Cycle:
        def __init__(self, complete):
            self.response_complete = complete

    new, answered, reading, again = (
        Connection(),
        Connection(Cycle(True), "ticks"),
        Connection(Cycle(False)),
        Connection(),
    )
    waiting = {}
    listen.hang_up({new, answered, reading, again}, waiting)
    assert not any(each.closed for each in (new, answered, reading, again)), "each has its time"
    again.cycle = Cycle(True)  # one request came and was answered, and the head of another began
    listen.hang_up({new, answered, reading, again}, waiting)
    assert [each.closed for each in (new, answered, reading, again)] == [True, False, False, False]


def test_clients_that_leave_in_the_middle_cost_nothing():
    model = FakeModel()
    service = Service(lambda: (model, ()), Limits(batch_tokens=64))
    with listening(service) as port:
        model.gate.clear()
        gone = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        for connection in gone:
            connection.sendall(post(json.dumps({"input": ["x"] * 4}).encode()))
        while service.batcher.items < 300:
            time.sleep(0.01)
        for connection in gone:
            connection.close()
        time.sleep(0.2)
        model.gate.set()
        assert is_well(port) and service.batcher.items == 0
    assert sum(model.batches) < 200  # warm-up, at most one batch of theirs and what is dropped while it goes on


def test_whoever_asks_much_without_waiting_is_answered_all_of_it_in_turn():
    """Far more than the server reads ahead."""
    model = FakeModel()
    asked = [post(json.dumps({"input": f"{n} " + "x" * 10_000}).encode()) for n in range(60)]
    with listening(Service(lambda: (model, ()), Limits())) as port:
        alone = [send(port, each) for each in asked]
        model.gate.clear()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            thread = threading.Thread(target=connection.sendall, args=[b"".join(asked)])
            thread.start()
            time.sleep(0.2)
            model.gate.set()
            with connection.makefile("rb") as answers:  # one by one, though several may come at once
                for status, body in alone:
                    head = b"".join(iter(answers.readline, b"\r\n"))
                    assert int(head[9:12]) == status == 200 and answers.read(len(body)) == body
            thread.join(20)


def test_a_client_that_leaves_is_known_by_the_request_that_is_answered():
    """It sent others behind it, in the same piece or later: uvicorn alone would tell the last one."""
    model, mine = FakeModel(), post(json.dumps({"input": ["x"] * 4}).encode())
    service = Service(lambda: (model, ()), Limits())
    left = service.metrics.requests.labels("/v1/embeddings", "499")._value

    def until(holds):
        for _ in range(2000):
            if holds():
                return
            time.sleep(0.01)
        raise AssertionError((service.batcher.items, left.get()))

    with listening(service) as port:
        for number, pieces in enumerate(([mine * 2], [mine, mine], [mine, mine, mine[:-5]])):
            model.gate.clear()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as stays:
                stays.sendall(FINE)
                until(lambda: service.batcher.batch == 1)
                computed = sum(model.batches)
                with socket.create_connection(("127.0.0.1", port), timeout=20) as leaves:
                    for piece in pieces:
                        leaves.sendall(piece)
                        until(lambda: service.batcher.items == 4)
                        time.sleep(0.1)
                until(lambda now=number + 1: left.get() == now)
                model.gate.set()
                assert answer_of(stays)[0] == 200 and is_well(port)
            assert sum(model.batches) == computed + 1


def test_a_vector_does_not_depend_on_its_batch_mates_under_load(tiny_model):
    """Whoever asks beside it, and in whatever batch: fp32 to 1e-6."""
    words = ["bade", "fima", "lora", "gu", "tipo", "rone"]
    texts = [" ".join(words[(n * k) % 6] for k in range(1, 2 + n % 30)) for n in range(60)]
    service = Service(lambda: open_all(str(tiny_model("bert")), [], "fp32", 256), Limits(batch_tokens=256))
    with listening(service) as port:

        def vector(text):
            status, body = send(port, post(json.dumps({"input": text}).encode()))
            assert status == 200
            return json.loads(body)["data"][0]["embedding"]

        alone = np.array([vector(text) for text in texts])
        found, before = {}, service.batcher.batch

        def ask(start):
            for n in range(len(texts)):
                place = (start * 7 + n) % len(texts)
                found[start, place] = vector(texts[place])

        threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == 8 * len(texts) and before == 0
        assert max(np.abs(alone[place] - vector).max() for (_, place), vector in found.items()) <= 1e-6


def started(model, port, *words):
    return subprocess.Popen([sys.executable, "-c", SERVE, "serve", str(model), "--port", str(port), *words],
                            env={**os.environ, "EMBEDTUNE_API_KEY": ""}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def until(port, wanted):
    """Wait until /readyz has this status."""
    for _ in range(2400):
        try:
            if send(port, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == wanted:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server does not come up")


def test_a_signal_while_it_loads_and_under_load(tiny_model):
    port = free_port()
    server = started(tiny_model("bert"), port)
    until(port, 503)  # it listens, and loads
    server.send_signal(signal.SIGTERM)
    _, said = server.communicate(timeout=120)
    assert server.returncode in (0, 143) and "Traceback" not in said, said

    server = started(tiny_model("bert"), port)
    until(port, 200)
    statuses, last = [], []

    def ask():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                while True:
                    last.append(1)
                    connection.sendall(post(json.dumps({"input": ["a text"] * 50}).encode()))
                    statuses.append(answer_of(connection)[0])
                    if statuses[-1] != 200:
                        return
        except OSError:
            statuses.append(0)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while statuses.count(200) < 20:
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    _, said = server.communicate(timeout=120)
    assert server.returncode in (0, 143) and "Traceback" not in said, said
    # What was accepted is answered; after that a connection is told 503 or closed, and is not left alone.
    assert set(statuses) <= {200, 503, 0} and len(statuses) == len(last)


def test_a_model_whose_process_is_killed_ends_the_server_and_its_requests(tiny_model):
    import psutil

    port = free_port()
    server = started(tiny_model("bert"), port)
    until(port, 200)
    (child,) = psutil.Process(server.pid).children()
    child.send_signal(signal.SIGSTOP)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(FINE)
        time.sleep(0.3)
        child.kill()
        status, body = answer_of(connection)
    assert status == 503 and b"answer no more" in body
    _, said = server.communicate(timeout=60)
    assert server.returncode not in (0, 2) and "Traceback" not in said, said


def test_a_server_that_is_killed_leaves_no_process_behind(tiny_model):
    import psutil

    port = free_port()
    server = started(tiny_model("bert"), port)
    until(port, 200)
    (child,) = psutil.Process(server.pid).children()
    server.kill()
    server.wait(20)
    child.wait(20)
