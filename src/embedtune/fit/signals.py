"""SIGINT and SIGTERM while a training runs: noted first, so that the step that is running can end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def caught() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM adds its number to; a second signal acts as if this were not here."""
    found: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        found.append(number)
        restore()

    for kind in kinds:
        signal.signal(kind, catch)
    try:
        yield found
    finally:
        restore()
