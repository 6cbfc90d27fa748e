"""Work for a client that is dropped when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

T = TypeVar("T")
CLOSED = 499  # nginx's status of a client that went away; nobody reads it but the metrics


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client goes away."""
    asked = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise HTTPException(CLOSED, "the client went away")
        return asked.result()
    finally:
        for task in (asked, gone):
            task.cancel()
        await asyncio.wait({asked, gone})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
