"""What is refused without the long way, and what is not; over a real socket the two look the same."""

import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serving import FakeModel, listening  # noqa: E402
from test_nasty import answer_of, post, send  # noqa: E402

from embedtune.serve import quick  # noqa: E402
from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402

BODY = json.dumps({"input": "a text"}).encode()
PLAIN = post(BODY)


def test_a_whole_plain_request_is_known():
    found = quick.whole(post(BODY, "/v1/embeddings?a=b", extra="Connection: Keep-Alive\r\nAuthorization: Bearer x\r\n"))
    assert found.path == "/v1/embeddings" and found.fields[b"authorization"] == b"Bearer x"


@pytest.mark.parametrize("data", [
    PLAIN[:-1], PLAIN + b"x", PLAIN + PLAIN, PLAIN[1:], PLAIN.replace(b"POST", b"GET"), PLAIN.replace(b"1.1", b"1.0"),
    post(BODY, extra="Content-Length: 3\r\n"), post(BODY, extra="Transfer-Encoding: chunked\r\n"),
    post(BODY, extra="Expect: 100-continue\r\n"), post(BODY, extra="Connection: close\r\n"),
    post(BODY, extra="Upgrade: websocket\r\n"), post(BODY, extra=" folded: x\r\n"), post(BODY, extra="no colon\r\n"),
    post(BODY, extra="a b: c\r\n"), post(BODY, extra="Host: y\r\n"), post(BODY, length="+19"), post(BODY, "/a b"),
    PLAIN.replace(b"/v1/embeddings", b"/v1/embeddi\nng:"), post(BODY, extra="a: b\nContent-Length: 3\r\n"),
    post(BODY, extra="a: b\rc\r\n"), post(BODY, extra="a: \0\r\n"), post(BODY, "/\x7f"), post(BODY, "/é"),
    post(b"x" * 2**16), PLAIN.replace(b"\r\n", b"\n"), b"", b"\r\n\r\n",
])  # fmt: skip
def test_all_else_is_left_to_the_parser(data):
    assert quick.whole(data) is None


@given(st.integers(1, len(PLAIN) - 1), st.binary(max_size=3))
def test_no_part_of_a_request_is_one(cut, more):
    data = PLAIN[:cut] + more  # with as many bytes as PLAIN it may be a request, of another body
    assert quick.whole(data) is None or len(data) == len(PLAIN)
    assert quick.whole(PLAIN[cut:]) is None


def test_how_long_a_request_may_be_that_is_looked_at():
    for more in (0, 1):
        data = post(b"x" * (quick.MOST - len(post(b"x" * 60_000)) + 60_000 + more))
        assert len(data) == quick.MOST + more and (quick.whole(data) is None) == bool(more)


def test_what_is_refused_at_once():
    asked = []

    def busy(path, size):
        asked.append((path, size))
        return 3.2 if path == "/full" else None

    request = quick.Whole("/full", {b"content-length": b"14", b"authorization": b"Bearer k"})
    refused = quick.refusing(busy, "k")
    assert refused(request) == quick.response(4) and refused(request._replace(path="/free")) is None
    for key in (b"Bearer kk", b"Bearer x", b"Bearer ", b"k", b"Basic k"):
        assert refused(request._replace(fields={**request.fields, b"authorization": key})) is None
    assert refused(quick.Whole("/full", {b"content-length": b"14"})) is None
    assert asked == [("/full", 14), ("/free", 14)], "who has no key is not counted"
    assert quick.refusing(busy, None)(quick.Whole("/full", {b"content-length": b"0"})) == quick.response(4)


def test_a_refusal():
    head, _, body = quick.response(3).partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 429 Too Many Requests", b"content-type: application/json", b"content-length: %d" % len(body),
        b"retry-after: 3",
    ]  # fmt: skip
    error = json.loads(body)["error"]
    assert error["message"] == "the queue is full, try again in 3 s" and error["type"] == "rate_limit_error"


class Full:
    """A server whose queue is full for as long as the model's gate is shut."""

    def __init__(self, monkeypatch, key=None):
        self.asked, self.model = [], FakeModel()
        self.service = Service(lambda: (self.model, ()), Limits(queue_seconds=30))
        monkeypatch.setattr(Service, "busy", lambda service, path, size: self._seen(path))
        self.full = threading.Event()

    def _seen(self, path):
        self.asked.append(path)
        return 3.2 if self.full.is_set() and path == "/v1/embeddings" else None


@pytest.fixture
def full(monkeypatch):
    return Full(monkeypatch)


def heads(connection, data):
    """The status line and the fields that count, and the body."""
    connection.sendall(data)
    found = b""
    while b"\r\n\r\n" not in found or not found.endswith(b"}"):
        found += connection.recv(65536)
    head, _, body = found.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    return lines[0], {line for line in lines[1:] if not line.startswith("date:")}, json.loads(body)


def test_both_ways_say_the_same(full):
    with listening(full.service) as port:
        full.full.set()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            short = heads(connection, PLAIN)
            again = heads(connection, PLAIN)  # the connection is kept
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(PLAIN[:30])  # in two parts: the parser has it
            time.sleep(0.1)
            long = heads(connection, PLAIN[30:])
    assert short == again == long
    assert short[0] == "http/1.1 429 too many requests" and "retry-after: 4" in short[1]
    assert short[2]["error"]["type"] == "rate_limit_error"


def test_a_connection_that_was_refused_is_answered_when_there_is_room(full):
    with listening(full.service) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for state, status in ((True, 429), (False, 200), (True, 429), (False, 200)):
            (full.full.set if state else full.full.clear)()
            connection.sendall(PLAIN)
            assert answer_of(connection)[0] == status


def test_what_is_half_read_is_never_taken_for_a_request(full):
    """A head that goes on with what looks like a request of its own: it is one request, and one answer."""
    with listening(full.service) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        full.full.set()
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX: ")
        time.sleep(0.1)
        connection.sendall(PLAIN)
        assert answer_of(connection)[0] == 429
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_who_has_no_key_hears_that_first(full):
    with listening(full.service, "secret-key") as port:
        full.full.set()
        assert send(port, PLAIN)[0] == 401
        assert send(port, post(BODY, extra="Authorization: Bearer secret-kez\r\n"))[0] == 401
        assert send(port, post(BODY, extra="Authorization: Bearer secret-key\r\n"))[0] == 429


def test_other_paths_are_not_touched(full):
    with listening(full.service) as port:
        full.full.set()
        assert send(port, post(BODY, "/nowhere"))[0] == 404
