"""The server: OpenAI's embeddings, text-embeddings-inference's, search, health and metrics over one queue."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from embedtune.errors import UserError
from embedtune.serve.batcher import (
    CHARACTERS,
    HUNG,
    Answer,
    BadIds,
    Batcher,
    Busy,
    Dead,
    Given,
    Hangs,
    Limits,
    NotFinite,
)
from embedtune.serve.gone import while_connected
from embedtune.serve.guard import kind_of
from embedtune.serve.metrics import Counted, Metrics
from embedtune.serve.schemas import (
    INPUTS,
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbedRequest,
    ErrorBody,
    Info,
    ModelCard,
    Models,
    Usage,
    error_body,
)
from embedtune.serve.searching import Library, Searched, add_search
from embedtune.serve.shelf import Shelf
from embedtune.serve.worker import Remote

T = TypeVar("T")
IDLE = 10.0  # seconds after which readiness is shown by a text of our own
EMBEDDING = {"/v1/embeddings", "/embed"}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody} for code in (400, 401, 404, 408, 413, 415, 422, 429, 500, 503)
}


@dataclass(eq=False)
class Service:
    """What the routes share. `load` gives the model, and the indexes with the models behind them; it is called in a
    thread when the server starts. Votes on what is found go to `feedback`.
    """

    load: Callable[[], tuple[Remote, Sequence[tuple[Shelf, Remote]]]]
    limits: Limits
    feedback: Path = Path("feedback.jsonl")
    also: tuple[str, ...] = ()  # further names of the model
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    model: Remote | None = None
    batcher: Batcher | None = None
    library: Library | None = None
    draining: bool = False
    failed: str | None = None
    loaded: Callable[[], None] = lambda: None  # called in the event loop's thread when all is loaded
    give_up: Callable[[], None] = lambda: None  # ends the server
    queues: dict[Remote, Batcher] = field(default_factory=dict)

    def ready(self) -> tuple[Remote, Batcher]:
        """The model and its queue; 503 where they are not there (yet, or any more)."""
        if self.draining:
            raise HTTPException(503, "the server is shutting down", {"Retry-After": "5"})
        if self.model is None or self.batcher is None:
            raise HTTPException(503, self.failed or "the model is being loaded", {"Retry-After": "2"})
        return self.model, self.batcher

    def names(self) -> list[str]:
        """What clients may call the model."""
        own = [self.model.name, Path(self.model.name).name] if self.model else []
        return list(dict.fromkeys([*own, *self.also]))

    def shelves(self) -> Library:
        """The indexes; 404 where the server has none, 503 while it loads."""
        self.ready()
        if self.library is None:
            raise HTTPException(404, "no index is served here: embedtune serve MODEL --index DIR")
        return self.library

    async def start(self) -> None:
        """Load the models, then answer."""
        try:
            model, shelves = await in_thread(self.load)
            for each in dict.fromkeys([model, *(other for _, other in shelves)]):
                self.queues[each] = queue = self._queue(each)
                queue.start()
                await queue.ask([Given("a text to warm up")] * 8)
            if shelves:
                self.library = Library([Searched(shelf, of, self.queues[of]) for shelf, of in shelves], self.feedback)
            self.model, self.batcher = model, self.queues[model]
            self.loaded()
        except Exception as error:  # whatever it is: `embedtune serve` ends, and says it
            self.fail(f"the model cannot be served: {error}")

    def fail(self, why: str) -> None:
        """End the server: nothing can be answered any more."""
        self.failed, self.model = self.failed or why, None
        self.give_up()

    def _queue(self, model: Remote) -> Batcher:
        limits = self.limits
        limits = Limits(limits.batch_tokens, limits.queue_seconds, limits.queue_items, model.max_length)
        return Batcher(model.compute, limits, lambda: self.fail("the process of the model has ended"))

    async def stop(self) -> None:
        """Answer what waits, then end."""
        for model, queue in self.queues.items():
            with suppress(TimeoutError):  # a model that hangs is ended without its answer
                async with asyncio.timeout(HUNG):
                    await queue.stop()
            model.close()

    def busy(self, path: str, size: int) -> float | None:
        """Seconds until an embedding can be asked for again, where there is no room for a body of `size` bytes now.

        One text is assumed: many are let through, and counted when they are read. What is refused here is counted.
        """
        if path not in EMBEDDING or self.batcher is None or self.draining:
            return None
        limits = self.batcher.limits
        seconds = self.batcher.over(min(limits.max_length, size // CHARACTERS), 1)
        if not seconds:
            return None
        self.metrics.requests.labels(path, "429").inc()
        return seconds

    async def embed(self, request: Request, given: Sequence[Given], dimensions: int | None) -> list[Answer]:
        """The answers of one request, while its client is there; vectors cut to `dimensions`."""
        model, batcher = self.ready()
        if dimensions is not None and dimensions > model.dimension:
            raise HTTPException(422, f"dimensions: the model has {model.dimension}, asked for {dimensions}")
        answers = await while_connected(request, batcher.ask(given))
        self.metrics.texts.inc(len(answers))
        self.metrics.tokens.inc(sum(answer.tokens for answer in answers))
        self.metrics.truncated.inc(sum(answer.cut for answer in answers))
        if dimensions is None:
            return answers
        return [answer._replace(vector=shortened(answer.vector, dimensions, model.normalised)) for answer in answers]


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives; the thread is a daemon: a server that is told to end does not wait until it has loaded."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if done.done() else settle(value))

    def run() -> None:
        try:
            tell(done.set_result, work())
        except Exception as error:
            tell(done.set_exception, error)

    Thread(target=run, name="load", daemon=True).start()
    return await done


def shortened(vector: np.ndarray, dimensions: int, normalised: bool) -> np.ndarray:
    """The first numbers of a vector (D,), of norm one again where the model's vectors are."""
    vector = vector[:dimensions]
    norm = float(np.linalg.norm(vector))
    return vector / norm if normalised and norm else vector


def written(vector: np.ndarray, form: str) -> list[float] | str:
    """Numbers, or base64 of little-endian float32, as OpenAI does it."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.astype(np.float64).tolist()
    return numbers


def make_app(service: Service) -> FastAPI:
    """The routes over a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        yield
        loading.cancel()
        await service.stop()

    app = FastAPI(title="embedtune", version=version("embedtune"), lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses=ERRORS)  # fmt: skip
    _errors(app, service.metrics)
    app.add_middleware(Counted, metrics=service.metrics)
    _openai(app, service)
    _inference(app, service)
    _health(app, service)
    add_search(app, service.shelves)
    return app


def _openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(asked: EmbeddingsRequest, request: Request) -> Response:
        """Vectors of texts, or of rows of token ids."""
        model, _ = service.ready()
        if asked.model is not None and asked.model not in (known := service.names()):
            raise HTTPException(404, f"there is no model {asked.model[:80]!r} here; there is {', '.join(known)}")
        inputs: Any = asked.input
        if isinstance(inputs, str) or isinstance(inputs[0], int):
            inputs = [inputs]
        prompt = model.prompt(asked.role)
        given = [Given(each if isinstance(each, str) else tuple(each), prompt) for each in inputs]
        answers = await service.embed(request, given, asked.dimensions)
        tokens = sum(answer.tokens for answer in answers)
        data = [
            Embedding(index=number, embedding=written(answer.vector, asked.encoding_format))
            for number, answer in enumerate(answers)
        ]
        cut = sum(answer.cut for answer in answers)
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        found = Embeddings(data=data, model=model.name, usage=usage, truncated=cut)
        # Written here: what a route returns is checked once more, number by number.
        return Response(found.model_dump_json(), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> Models:
        """The model that is served."""
        model, _ = service.ready()
        return Models(data=[ModelCard(id=model.name, created=service.started)])


def _inference(app: FastAPI, service: Service) -> None:
    @app.post("/embed")
    async def embed(asked: EmbedRequest, request: Request) -> list[list[float]]:
        """Vectors of texts, as text-embeddings-inference gives them."""
        model, _ = service.ready()
        if asked.normalize is False and model.normalised:
            raise HTTPException(422, "normalize: the model itself normalises its vectors")
        if asked.prompt_name is not None and asked.prompt_name not in model.prompts:
            known = ", ".join(model.prompts) or "none"
            raise HTTPException(422, f"prompt_name: the model has no {asked.prompt_name!r}; it has {known}")
        prompt = model.prompts[asked.prompt_name] if asked.prompt_name is not None else model.prompt("text")
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        answers = await service.embed(request, [Given(text, prompt) for text in texts], asked.dimensions)
        if asked.truncate is False and any(answer.cut for answer in answers):
            raise HTTPException(413, f"a text is longer than the {model.max_length} tokens that the model reads")
        vectors = [answer.vector for answer in answers]
        if asked.normalize is not False and not model.normalised:
            vectors = [shortened(vector, len(vector), True) for vector in vectors]
        return [vector.astype(np.float64).tolist() for vector in vectors]

    @app.get("/info")
    async def info() -> Info:
        """What is served."""
        model, batcher = service.ready()
        return Info(model_id=model.name, model_sha=model.sha256, model_dtype=model.precision,
                    max_input_length=model.max_length, max_batch_tokens=batcher.limits.batch_tokens,
                    max_client_batch_size=INPUTS, version=version("embedtune"))  # fmt: skip


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def readyz() -> str:
        """The model answers: it did a moment ago, or it does now."""
        _, batcher = service.ready()
        if time.monotonic() - batcher.worked > IDLE:
            try:
                await asyncio.wait_for(batcher.ask([Given("ready?")]), IDLE)
            except (Busy, Hangs, TimeoutError) as error:
                # A full queue is a good sign as long as batches come out of it.
                if not isinstance(error, Busy) or time.monotonic() - batcher.worked > HUNG:
                    raise HTTPException(503, "the model does not answer", {"Retry-After": "5"}) from error
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        found, batcher = service.metrics, service.batcher
        found.up.set(batcher is not None and batcher.alive and not service.draining)
        if batcher is not None:
            found.queue_tokens.set(batcher.waiting)
            found.queue_texts.set(batcher.items)
            found.rate.set(batcher.rate)
        return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


def _errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(status: int, error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind_of(status)), status, headers)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return answer(429, error, {"Retry-After": str(math.ceil(error.seconds))})

    @app.exception_handler(Hangs)
    @app.exception_handler(Dead)
    async def unable(request: Request, error: Exception) -> JSONResponse:
        return answer(503, error, {"Retry-After": "2"})

    @app.exception_handler(BadIds)
    async def bad(request: Request, error: BadIds) -> JSONResponse:
        return answer(422, error)

    @app.exception_handler(NotFinite)
    async def wrong(request: Request, error: NotFinite) -> JSONResponse:
        metrics.not_finite.inc()
        return answer(500, error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), kind_of(error.status_code))
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        where, message = _explained(error.errors())
        return JSONResponse(error_body(message, kind_of(422), where), 422)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse(error_body(str(error).removeprefix("--"), kind_of(422)), 422)


def _explained(problems: Sequence[Any]) -> tuple[str | None, str]:
    """The field, and what is wrong in words; of the several forms that a field may have, the one that fits best."""
    best = max(problems, key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
    if best["type"] == "json_invalid":
        return None, f"the body is not JSON, from character {best['loc'][-1]} on"
    if len(best["loc"]) < 2:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    where = str(best["loc"][1])
    return where, f"{where}: {best['msg']}"
