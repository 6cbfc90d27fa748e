"""A model that is no model, and a client that speaks ASGI: for tests of the server without a network."""

import asyncio
import json
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager

import numpy as np

from embedtune.serve.app import Service, make_app
from embedtune.serve.batcher import Answer, BadIds, Limits, NotFinite
from embedtune.serve.guard import Guard
from embedtune.serve.listen import make_server
from embedtune.serve.model import open_served
from embedtune.serve.worker import guarded


class FakeModel:
    """Vectors that depend on the text alone; `seconds` a batch; texts with "nan" in them fail."""

    name, sha256, precision, max_length, normalised = "fake", "0" * 64, "fp32", 32, True
    prompts = {"query": "query: ", "document": ""}

    def __init__(self, dimension=8, seconds=0.0, vocabulary=1000):
        self.dimension, self.seconds, self.vocabulary = dimension, seconds, vocabulary
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def prompt(self, role):
        return self.prompts.get(role, "")

    def close(self):
        self.gate.set()

    def compute(self, given):
        self.batches.append(len(given))
        self.gate.wait(20)
        time.sleep(self.seconds)
        return guarded(lambda some: [self.one(each) for each in some], given)

    def one(self, each):
        if isinstance(each.content, tuple) and max(each.content) >= self.vocabulary:
            return BadIds("token id is not among those of the model")
        if each.content == "nan":
            return NotFinite("the model gave NaN")
        if each.content == "boom":
            raise RuntimeError("boom")
        text = (each.prompt or "") + str(each.content)
        vector = np.random.default_rng(list(text.encode())).normal(size=self.dimension).astype(np.float32)
        return Answer(vector / np.linalg.norm(vector), min(32, len(text.split()) + 2), len(text.split()) > 30)


class Client:
    """Requests to an ASGI app, in this event loop."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, method, path, body=None, headers=(), raw=None, gone=None):
        """(status, headers, body) of a request; `gone` is an event after which the client is not there any more."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        given = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *headers]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
                 "raw_path": path.encode(), "query_string": b"", "headers": given, "scheme": "http",
                 "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
        told, answer = [{"type": "http.request", "body": data, "more_body": False}], []

        async def receive():
            if told:
                return told.pop()
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            answer.append(message)

        await self.app(scope, receive, send)
        status, found = answer[0]["status"], dict(answer[0]["headers"])
        text = b"".join(part.get("body", b"") for part in answer[1:])
        is_json = found.get(b"content-type", b"").startswith(b"application/json")
        return status, found, json.loads(text) if is_json else text.decode()


@asynccontextmanager
async def serving(model, key=None, **limits):
    """A client of a server whose model is loaded."""
    service = Service(lambda: (model, ()), Limits(**limits))
    app = make_app(service)
    async with app.router.lifespan_context(app):
        while service.batcher is None and service.failed is None:
            await asyncio.sleep(0.005)
        yield Client(Guard(app, key, service.busy)), service
        model.gate.set()


def in_process(name, precision, batch_tokens):
    """A model without a process of its own, in place of open_remote: tests of what is around it start sooner."""
    served = open_served(name, precision, batch_tokens)
    object.__setattr__(served, "close", lambda: None)
    return served


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]


@contextmanager
def listening(service, key=None):
    """The port of a server in a thread, with the settings of the command."""
    port = free_port()
    server = make_server(service, key, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while service.batcher is None or not server.started:
        assert not service.failed, service.failed
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
