"""The guard alone, with an app that writes down what reaches it; the whole server is tried in test_server.py."""

import asyncio
import base64
import json

import pytest

pytest.importorskip("fastapi")

from embedtune.serve import guard  # noqa: E402
from embedtune.serve.guard import DEPTH, SMALL, Guard, kind_of, too_deep  # noqa: E402

BODY = b'{"input": "a"}'


class Asked:
    """One request: what the app got of it, and what came back."""

    def __init__(self, parts=(BODY,), method="POST", path="/embed", headers=None, type="http", **guarded):
        length = [(b"content-length", str(sum(map(len, parts))).encode())]
        self.scope = {"type": type, "method": method, "path": path, "headers": length if headers is None else headers}
        self.parts, self.passed, self.got, self.sent = list(parts), False, [], []
        asyncio.run(Guard(self.app, **guarded)(self.scope, self.receive, self.send))
        self.status = self.sent[0]["status"] if self.sent else None
        self.fields = dict(self.sent[0]["headers"]) if self.sent else {}

    async def app(self, scope, receive, send):
        self.passed = True
        if self.scope["method"] == "POST" and scope["type"] == "http":
            self.got = [await receive(), await receive()]

    async def receive(self):
        if not self.parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}

    async def send(self, message):
        self.sent.append(message)

    def error(self):
        body = self.sent[1]["body"]
        assert self.fields[b"content-length"] == str(len(body)).encode()
        return json.loads(body)["error"]


def test_a_body_is_passed_on_whole_and_what_comes_after_it_too():
    asked = Asked([b'{"input":', b' "a"', b"}"])
    assert asked.got == [{"type": "http.request", "body": BODY, "more_body": False}, {"type": "http.disconnect"}]
    assert asked.sent == []


def test_a_client_that_goes_away_in_its_body_gives_an_empty_one():
    asked = Asked([])
    assert asked.got[0]["body"] == b""


def test_a_body_is_as_large_as_it_may_be_and_no_larger():
    assert Asked([b"x" * 10], most_bytes=10).passed and Asked([b"x" * 5, b"x" * 5], most_bytes=10).passed
    for parts, headers, left in (
        ([b"x" * 11], None, 1), ([b"x" * 5, b"x" * 6, b"x"], [(b"content-length", b"3")], 1),
        ([b"x" * 11, b"x"], [], 1), ([b"x" * 11, b"x"], [(b"content-length", b"+1")], 1),
    ):  # fmt: skip
        asked = Asked(parts, headers=headers, most_bytes=10)
        assert asked.status == 413 and not asked.passed and len(asked.parts) == left
        assert asked.error() == {"message": "the body is larger than 10 bytes", "type": "invalid_request_error",
                                 "param": None, "code": None}  # fmt: skip
        assert asked.fields[b"connection"] == b"close" and asked.fields[b"content-type"] == b"application/json"


def test_depth():
    assert Asked([b"[" * DEPTH]).passed
    asked = Asked([b"[" * (DEPTH + 1)])
    assert asked.status == 400 and f"deeper than {DEPTH} brackets" in asked.error()["message"]
    assert too_deep(b"[{" * 2, most=3) and not too_deep(b"[{]}" * 9, most=2) and not too_deep(b'"[[["', most=0)
    assert too_deep(b'"\\\\"[', most=0) and not too_deep(b'"\\"[', most=0) and not too_deep(b'"\n[', most=0)


@pytest.mark.parametrize("size, closed", [(10, False), (SMALL, False), (SMALL + 1, True)])
def test_where_there_is_no_room_a_small_body_is_read_and_the_connection_kept(size, closed):
    seen = []
    asked = Asked([b"x" * size], busy=lambda *given: seen.append(given) or 3.2)
    assert asked.status == 429 and not asked.passed and seen == [("/embed", size)]
    assert asked.fields[b"retry-after"] == b"4" and asked.error()["type"] == "rate_limit_error"
    assert (b"connection" in asked.fields) == closed and bool(asked.parts) == closed


def test_what_has_no_body_is_passed_on():
    for method in ("GET", "HEAD", "OPTIONS"):
        assert Asked(method=method, busy=lambda path, size: 9.0).passed
    assert Asked(type="lifespan", key="k").passed
    assert Asked(method="DELETE", busy=lambda path, size: 9.0).status == 429


def test_keys():
    def answered(*given, path="/embed"):
        return Asked(key="sésame", path=path, headers=[(b"authorization", each) for each in given]).passed

    bearer, wrong = "Bearer sésame".encode(), b"Bearer sesame"
    basic = b"Basic " + base64.b64encode("user:sésame".encode())
    assert answered(bearer) and answered(basic) and answered(path="/livez")
    for given in ((), (wrong,), (bearer, bearer), (b"Basic !!",),
                  (b"Basic " + base64.b64encode("sésame".encode()),), (b"Token " + "sésame".encode(),), (b"",),
                  (b"Basic " + base64.b64encode(b"user:sesame"),)):  # fmt: skip
        assert not answered(*given)
    asked = Asked(key="k")
    assert asked.status == 401 and asked.error()["type"] == "authentication_error"
    assert asked.fields[b"www-authenticate"].startswith(b"Basic realm=")
    assert not Asked(key="", headers=[]).passed, "an empty key is a key all the same"


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)

    async def never(self):
        await asyncio.sleep(60)

    monkeypatch.setattr(Asked, "receive", never)
    asked = Asked()
    assert asked.status == 408 and "did not come within" in asked.error()["message"] and not asked.passed


def test_names_of_errors():
    assert [kind_of(status) for status in (400, 401, 404, 413, 422, 429, 499, 500, 503)] == [
        "invalid_request_error", "authentication_error", "not_found_error", "invalid_request_error",
        "invalid_request_error", "rate_limit_error", "invalid_request_error", "server_error", "server_error",
    ]  # fmt: skip
