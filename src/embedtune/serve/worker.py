"""The model in a process of its own: whatever the server has to parse and to refuse, the model keeps computing.

In one process both share an interpreter that runs one of them at a time, and a flood of requests takes it from the
model. Batches go over a socket pair as JSON, vectors come back as bytes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import Role
from embedtune.encoder.shapes import few_shapes
from embedtune.errors import UserError
from embedtune.serve.batcher import Answer, BadIds, Compute, Given, NotFinite
from embedtune.serve.model import Served, open_served

# Its standard input is a lifeline: when the server ends, in whatever way, it ends at once, in whatever it is doing.
MAIN = """import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from embedtune.serve.worker import work
work(*sys.argv[1:])"""
KNOWN: dict[str, type[Exception]] = {"BadIds": BadIds, "NotFinite": NotFinite}


@dataclass(frozen=True, eq=False)
class Remote:
    """A model that another process has loaded: what the routes ask of it, and `compute`, for one thread at a time."""

    name: str
    sha256: str
    precision: Precision
    dimension: int
    max_length: int
    normalised: bool
    prompts: dict[str, str]
    roles: dict[Role, str]  # the prompt of each
    pipe: Connection
    process: subprocess.Popen[bytes]

    def prompt(self, role: Role) -> str:
        """What stands before texts of a role."""
        return self.roles[role]

    def compute(self, given: Sequence[Given]) -> list[Answer | Exception]:
        """An answer for each text, or what is wrong with it. Raises EOFError or OSError where the process has ended."""
        self.pipe.send_bytes(json.dumps(given).encode())
        said, vectors = json.loads(self.pipe.recv_bytes()), self.pipe.recv_bytes()
        rows = iter(np.frombuffer(vectors, np.float32).reshape(-1, self.dimension))
        return [
            Answer(next(rows), tokens, cut) if kind is None else KNOWN.get(kind, RuntimeError)(message)
            for kind, message, tokens, cut in said
        ]

    def close(self) -> None:
        """End the process."""
        self.process.kill()  # all that was asked has been answered
        self.process.communicate()
        self.pipe.close()


def open_remote(name: str, precision: Precision, batch_tokens: int) -> Remote:
    """Start the process, and wait until the model is loaded. Raises UserError as `open_served` does."""
    ours, theirs = Pipe()
    words = [sys.executable, "-c", MAIN, str(theirs.fileno()), name, precision, str(batch_tokens)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=2, pass_fds=[theirs.fileno()],
                               env={**few_shapes(), **os.environ})  # fmt: skip
    theirs.close()
    try:
        facts = json.loads(ours.recv_bytes())
    except EOFError:
        raise UserError(f"the process of the model ended while it loaded ({process.wait()})", where=name) from None
    if "what" in facts:
        raise UserError(facts["what"], where=facts["where"], fix=facts["fix"], details=facts["details"])
    return Remote(**facts, pipe=ours, process=process)


def work(handle: str, name: str, precision: Precision, batch_tokens: str) -> None:
    """What the process does: load, say what it has loaded, and compute until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all: the server says when it ends
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError), Connection(int(handle)) as pipe:  # that the server has ended is no error
        try:
            served = open_served(name, precision, int(batch_tokens))
        except UserError as error:
            pipe.send_bytes(json.dumps(vars(error)).encode())
            return
        pipe.send_bytes(json.dumps(_facts(served)).encode())
        while True:
            asked = json.loads(pipe.recv_bytes())
            given = [Given(tuple(each) if isinstance(each, list) else each, prompt) for each, prompt in asked]
            answers = guarded(served.compute, given)
            pipe.send_bytes(json.dumps([_said(answer) for answer in answers]).encode())
            pipe.send_bytes(b"".join(answer.vector.tobytes() for answer in answers if isinstance(answer, Answer)))


def _facts(served: Served) -> dict[str, Any]:
    names = ("name", "sha256", "precision", "dimension", "max_length", "normalised", "prompts")
    roles: tuple[Role, ...] = ("query", "document", "text")
    return {**{name: getattr(served, name) for name in names}, "roles": {role: served.prompt(role) for role in roles}}


def guarded(compute: Compute, given: Sequence[Given]) -> Sequence[Answer | Exception]:
    """An error of the whole batch is the error of each; if several were in it, each is tried alone first."""
    try:
        return compute(given)
    except Exception as error:
        if len(given) > 1:
            return [guarded(compute, [each])[0] for each in given]
        logging.getLogger("embedtune").exception("a text could not be embedded: a bug of ours")
        return [error]


def _said(answer: Answer | Exception) -> tuple[str | None, str, int, bool]:
    if isinstance(answer, Exception):
        return type(answer).__name__, str(answer), 0, False
    return None, "", answer.tokens, answer.cut
