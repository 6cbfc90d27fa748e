"""Refusals without the long way: under overload nearly all that comes is refused, and the routes cost far more.

A connection is looked at here as long as it sends one whole plain request after the other: so nothing is ever half
read, and what the parser sees is what it would have seen.
"""

from __future__ import annotations

import hmac
import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from embedtune.serve.schemas import error_body

MOST = 2**16  # bytes of a request that is looked at
NAME = re.compile(rb"[a-z0-9-]+")
TARGET, VALUE = re.compile(rb"[!-~]+"), re.compile(rb"[\t -~\x80-\xff]*")  # to parsers a lone line feed may end a line
ODD = {b"transfer-encoding", b"expect", b"upgrade"}
FULL = "the queue is full, try again in {} s"


class Whole(NamedTuple):
    """A request: the path, and the head's fields by their names in small letters."""

    path: str
    fields: dict[bytes, bytes]


def whole(data: bytes) -> Whole | None:
    """The request that `data` is, if it is exactly one, with a body of a stated length; None for all else."""
    head, end, body = data.partition(b"\r\n\r\n") if len(data) <= MOST else (b"", b"", b"")
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ")
    if not end or len(words) != 3 or words[0] != b"POST" or words[2] != b"HTTP/1.1":
        return None
    if not TARGET.fullmatch(words[1]):
        return None
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or name in fields or not NAME.fullmatch(name) or not VALUE.fullmatch(value):
            return None
        fields[name] = value.strip(b" \t")
    stays = fields.get(b"connection", b"keep-alive").lower() == b"keep-alive"
    if fields.get(b"content-length") != b"%d" % len(body) or not stays or ODD & fields.keys():
        return None
    return Whole(words[1].partition(b"?")[0].decode("latin-1"), fields)


def refusing(busy: Callable[[str, int], float | None], key: str | None) -> Callable[[Whole], bytes | None]:
    """What to answer a request that the queue has no room for; None for one that the routes must see.

    `busy`: seconds to wait where a path has no room for a body of so many bytes; it counts the refusal. Who has no key
    is the routes' matter.
    """
    wanted = None if key is None else b"Bearer " + key.encode()

    def refused(request: Whole) -> bytes | None:
        if wanted is not None and not hmac.compare_digest(request.fields.get(b"authorization", b""), wanted):
            return None
        seconds = busy(request.path, int(request.fields[b"content-length"]))
        return None if seconds is None else response(math.ceil(seconds))

    return refused


@lru_cache(64)
def response(seconds: int) -> bytes:
    """A whole answer with status 429; thousands a second are the same."""
    body = json.dumps(error_body(FULL.format(seconds), "rate_limit_error")).encode()
    head = (
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: {seconds}\r\n\r\n"
    )
    return head.encode() + body
