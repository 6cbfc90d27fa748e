"""What stands before every route: the key, the size and depth of a body, and the form of an error."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedtune.serve.quick import FULL
from embedtune.serve.schemas import error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Busy = Callable[[str, int], float | None]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY = 2 * 2**20  # bytes of a request's body
SMALL = 2**16  # bytes of a body that is read although the answer is no
BODY_SECONDS = 30  # in which a body must have come
DEPTH = 32  # brackets inside brackets
PUBLIC = {"/livez"}
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
BRACKETS = re.compile(rb"[][{}]")
KINDS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}


def kind_of(status: int) -> str:
    """OpenAI's name of an error."""
    return KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


@dataclass(frozen=True)
class Guard:
    """ASGI middleware: refuses a request before any work is done for it.

    A key is taken as `Authorization: Bearer KEY`, or as the password of `Basic` (what a browser asks for).
    """

    app: App
    key: str | None = None
    busy: Busy = lambda path, size: None  # noqa: E731 - seconds to wait, where there is no room for a body
    most_bytes: int = BODY

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.key is not None and scope["path"] not in PUBLIC and not self._has_key(scope):
            given = [(b"www-authenticate", b'Basic realm="embedtune", charset="UTF-8"')]
            return await refuse(send, 401, "a valid key is needed: Authorization: Bearer KEY", given)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        seconds = self.busy(scope["path"], _length(scope))
        try:
            async with asyncio.timeout(BODY_SECONDS):
                # Where the answer is no, the head is enough; a small body is read, so that the connection can be kept.
                wanted = seconds is None or _length(scope) <= SMALL
                body = await self._body(scope, receive) if wanted else None
        except TimeoutError:
            return await refuse(send, 408, f"the body did not come within {BODY_SECONDS} seconds")
        if seconds is not None:
            later = math.ceil(seconds)
            given = [(b"retry-after", b"%d" % later)]
            return await refuse(send, 429, FULL.format(later), given, body is not None)
        if body is None:
            return await refuse(send, 413, f"the body is larger than {self.most_bytes:,} bytes")
        if too_deep(body):
            return await refuse(send, 400, f"the body is nested deeper than {DEPTH} brackets")
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, again, send)

    def _has_key(self, scope: Scope) -> bool:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        wanted = (self.key or "").encode()
        if len(found) != 1:
            return False
        scheme, _, rest = found[0].partition(b" ")
        if scheme == b"Bearer":
            return hmac.compare_digest(rest, wanted)
        if scheme == b"Basic":
            try:
                return hmac.compare_digest(base64.b64decode(rest, validate=True).partition(b":")[2], wanted)
            except ValueError:
                return False
        return False

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None as soon as it is known to be too large, whatever Content-Length says."""
        if _length(scope) > self.most_bytes:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.most_bytes:
                return None
        return b"".join(parts)


def _length(scope: Scope) -> int:
    said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(said) if said.isdigit() else 0


def too_deep(body: bytes, most: int = DEPTH) -> bool:
    """Whether brackets outside of strings are nested deeper than `most`; the JSON is not parsed for it."""
    depth = 0
    for found in BRACKETS.finditer(STRINGS.sub(b"", body)):
        depth += 1 if found.group() in b"[{" else -1
        if depth > most:
            return True
    return False


async def refuse(
    send: Send, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = (), keep: bool = False
) -> None:
    """Answer with an error and close the connection, as what is left of the body is not read; `keep` where it was."""
    body = json.dumps(error_body(message, kind_of(status))).encode()
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    if not keep:
        given.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})
