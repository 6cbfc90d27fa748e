"""How the server listens: heads of requests that do not end, or do not come, are hung up on; uvicorn bounds neither."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from embedtune.serve.app import Service, make_app
from embedtune.serve.guard import Guard
from embedtune.serve.quick import Whole, refusing, whole

HEAD = 2**16  # bytes of a request's head
HEAD_SECONDS = 5  # in which it must have come, at the latest twice that
COLLECT = 60  # seconds between two looks of the garbage collector; nearly all that a request makes needs none
NICE = 5  # how far the thread of the event loop steps back behind the model


def make_server(service: Service, key: str | None, host: str, port: int) -> uvicorn.Server:
    """A server that on a signal refuses what comes and answers what is here, and that ends when it cannot serve."""
    waiting: dict[Any, Any] = {}
    collected = time.monotonic()

    async def every_few_seconds() -> None:
        nonlocal collected
        hang_up(server.server_state.connections, waiting)
        if not gc.isenabled() and time.monotonic() - collected > COLLECT:
            gc.collect()
            collected = time.monotonic()

    http: Any = listening(AutoHTTPProtocol, refusing(service.busy, key))
    config = uvicorn.Config(Guard(make_app(service), key, service.busy), host, port, log_level="warning",
                            http=http, ws="none", lifespan="on", server_header=False,
                            timeout_keep_alive=30, timeout_graceful_shutdown=30,
                            timeout_notify=HEAD_SECONDS, callback_notify=every_few_seconds)  # fmt: skip
    server = uvicorn.Server(config)
    leave = server.handle_exit

    def handle(sig: int, frame: Any) -> None:
        service.draining = True
        leave(sig, frame)

    server.handle_exit = handle  # type: ignore[method-assign]
    service.give_up = lambda: setattr(server, "should_exit", True)
    service.loaded = settle
    return server


def settle() -> None:
    """All is loaded: the collector comes by the clock from now on, and the model comes first.

    Under overload thousands of requests wait, and looking through them again and again took half of the event loop's
    time. The priority is that of this thread alone, where the system can do that (Linux): saying no takes what the
    model leaves of the cores. A server in a thread of another program leaves that program's settings alone.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.nice(0) + NICE))


def listening(protocol: Callable[..., Any], refused: Callable[[Whole], bytes | None]) -> Callable[..., Any]:
    """uvicorn's `protocol` for one connection, which answers 400 and closes when a head is larger than HEAD.

    What `refused` has an answer for is answered here, as long as nothing of a request was left in the parser.
    """

    def made(*args: Any, **named: Any) -> Any:
        connection = protocol(*args, **named)
        feed, size, known, clean, ahead = connection.data_received, 0, None, True, 0

        def data_received(data: bytes) -> None:
            nonlocal size, known, clean, ahead
            request = whole(data) if clean and _between(connection) else None
            clean = request is not None
            if request and (answer := refused(request)):
                _answer(connection, answer)
                return
            size = 0 if connection.cycle is not known else size
            known = connection.cycle
            size += len(data) if _between(connection) or not connection.cycle.more_body else 0
            feed(data)
            if size > HEAD and connection.cycle is known and not connection.transport.is_closing():
                if _between(connection):
                    connection.send_400_response("the head of the request is too large")
                else:
                    connection.flow.pause_reading()  # until what came before is answered: uvicorn resumes then
            ahead = ahead + len(data) if getattr(connection, "pipeline", None) else 0
            if 0 < ahead <= HEAD and not connection.transport.is_closing():
                connection.flow.resume_reading()  # uvicorn stops here, and whoever does not read hears of no leaving

        connection.data_received = data_received
        _tell_the_answered(connection)
        return connection

    return made


def _tell_the_answered(connection: Any) -> None:
    """When a client leaves, let the request that is being answered hear of it.

    uvicorn tells the one that came last. Where several were sent without waiting, that one has not begun, and the
    model would compute for nobody. Its slower parser (h11) has one at a time.
    """
    if not hasattr(connection, "_start_asgi_task"):
        return
    start, lost, answered = connection._start_asgi_task, connection.connection_lost, None

    def started(cycle: Any, app: Any) -> None:
        nonlocal answered
        answered = cycle
        start(cycle, app)

    def connection_lost(error: Exception | None) -> None:
        lost(error)
        if answered is not None and not answered.response_complete:
            answered.disconnected = True
            answered.message_event.set()

    connection._start_asgi_task, connection.connection_lost = started, connection_lost


def _answer(connection: Any, answer: bytes) -> None:
    """Write a whole answer, and let uvicorn's clock for a connection that is not used begin anew."""
    connection._unset_keepalive_if_required()
    connection.transport.write(answer)
    wait, close = connection.timeout_keep_alive, connection.timeout_keep_alive_handler
    connection.timeout_keep_alive_task = connection.loop.call_later(wait, close)


def hang_up(connections: set[Any], waiting: dict[Any, Any]) -> None:
    """Close the connections that had sent no whole head when this was called last, and have not since.

    `waiting` is kept from call to call. A connection that was answered has uvicorn's own clock, until it sends.
    """
    now = {each: each.cycle for each in connections if _between(each) and each.timeout_keep_alive_task is None}
    for connection, cycle in now.items():
        if connection in waiting and waiting[connection] is cycle:
            connection.transport.close()
    waiting.clear()
    waiting.update(now)


def _between(connection: Any) -> bool:
    """Whether no request is being read or answered."""
    return connection.cycle is None or connection.cycle.response_complete
