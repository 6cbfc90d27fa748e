"""The routes over an index: search, the map, votes, and the page that uses them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response

from embedtune import files
from embedtune.nearest import unit
from embedtune.search.contract import Hit
from embedtune.serve.batcher import Batcher, Busy, Given, Hangs, NotFinite
from embedtune.serve.gone import while_connected
from embedtune.serve.schemas import About, Atlas, Feedback, Found, Kept, Results, SearchAnswer, SearchRequest
from embedtune.serve.shelf import Shelf, Span, passages
from embedtune.serve.worker import Remote

MARKED = 10  # hits whose best passage is looked for: each has up to sixteen, which all are embedded
WAITING = 64  # searches at once; the model's queue refuses by its own rule
PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"),
        "/page.css": ("page.css", "text/css")}  # fmt: skip
# Nothing but our own files, no inline script, no other page that frames this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True, eq=False)
class Searched:
    """An index and the model behind it."""

    shelf: Shelf
    model: Remote
    batcher: Batcher


@dataclass(eq=False)
class Library:
    """What is searched: one index, or two side by side; votes go to `feedback`."""

    searched: Sequence[Searched]
    feedback: Path
    going: int = 0
    atlas: dict[str, Any] | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="search"))

    async def search(self, asked: SearchRequest) -> SearchAnswer:
        """The texts that each index finds, with their best passages and what moved."""
        if self.going >= WAITING:
            raise Busy(1.0)
        self.going += 1
        start = time.monotonic()
        try:
            results = [Results(model=each.shelf.name, hits=await self._found(each, asked)) for each in self.searched]
        finally:
            self.going -= 1
        if len(results) > 1:
            _compare(results[0].hits, results[1].hits)
        return SearchAnswer(results=results, seconds=time.monotonic() - start)

    async def _found(self, each: Searched, asked: SearchRequest) -> list[Found]:
        """The texts, the first of them with the passage that is nearest to the query."""
        (answer,) = await each.batcher.ask([Given(asked.query, each.model.prompt("query"))])

        def look() -> list[Hit]:
            return each.shelf.index.search([asked.query], asked.top, mode=asked.mode, where=asked.where,
                                           vectors=answer.vector[None])[0]  # fmt: skip

        hits = await asyncio.get_running_loop().run_in_executor(self.thread, look)
        spans = [passages(hit.text) if place < MARKED else [] for place, hit in enumerate(hits)]
        prompt = each.model.prompt("document")
        given = [Given(hit.text[a:b], prompt) for hit, parts in zip(hits, spans) for a, b in parts]
        best: list[Span] = [(0, 0)] * len(hits)
        if given:
            try:
                vectors = [answer.vector, *(other.vector for other in await each.batcher.ask(given))]
                best = _best(np.stack(vectors), spans)
            except (Busy, Hangs, NotFinite):
                pass  # a passage is a help for the eye; the hits are there without it
        return [Found(id=hit.id, score=hit.score, text=hit.text, columns=hit.columns, passage=span)
                for hit, span in zip(hits, best, strict=True)]  # fmt: skip

    async def map(self) -> dict[str, Any]:
        """The map, made once."""
        if self.atlas is None:
            shelf = self.searched[0].shelf
            self.atlas = await asyncio.get_running_loop().run_in_executor(self.thread, shelf.map)
        return self.atlas

    def keep(self, vote: Feedback) -> None:
        """Write a vote down, with the text it is on."""
        text = self.searched[0].shelf.text(vote.id)
        if text is None:
            raise HTTPException(404, f"no text has the id {vote.id[:80]!r}")
        row = {"query": vote.query, "id": vote.id, "text": text, "verdict": vote.verdict, "model": vote.model,
               "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
        files.append_line(self.feedback, json.dumps(row, ensure_ascii=False))


def _best(vectors: np.ndarray, spans: Sequence[Sequence[Span]]) -> list[Span]:
    """For each text the span whose vector is nearest to the first of `vectors` (1 + spans, D)."""
    near = unit(vectors)
    scores, best, place = near[1:] @ near[0], [], 0
    for parts in spans:
        here = scores[place : place + len(parts)]
        best.append(parts[int(here.argmax())] if len(parts) else (0, 0))
        place += len(parts)
    return best


def _compare(hits: list[Found], others: list[Found]) -> None:
    """Say of each hit how many places it stands higher than in the other list."""
    there = {hit.id: place for place, hit in enumerate(others)}
    for place, hit in enumerate(hits):
        hit.new = hit.id not in there
        hit.moved = None if hit.new else there[hit.id] - place


def add_search(app: FastAPI, library: Any) -> None:
    """The routes; `library()` gives the Library, or raises where there is none."""

    @app.post("/search")
    async def search(asked: SearchRequest, request: Request) -> SearchAnswer:
        """Texts that fit a query."""
        answer: SearchAnswer = await while_connected(request, library().search(asked))
        return answer

    @app.get("/about")
    async def about() -> About:
        """What is searched."""
        found: Library = library()
        first = found.searched[0].shelf
        return About(texts=len(first.places), models=[each.shelf.name for each in found.searched],
                     lexical=all(bool(each.shelf.index.manifest.lexical) for each in found.searched),
                     filters=first.filters)  # fmt: skip

    @app.get("/map")
    async def atlas() -> Atlas:
        """The texts on a plane."""
        return Atlas(**await library().map())

    @app.post("/feedback")
    async def feedback(vote: Feedback) -> Kept:
        """Whether a text fits a query; kept for `embedtune fit contrastive`."""
        library().keep(vote)
        return Kept()

    for path, (name, kind) in PAGE.items():
        _static(app, path, resources("embedtune.serve").joinpath("page", name).read_bytes(), kind)


def _static(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache",
               "Referrer-Policy": "no-referrer"}  # fmt: skip

    @app.get(path, include_in_schema=False)
    async def static() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)
