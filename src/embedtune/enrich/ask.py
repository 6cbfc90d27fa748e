"""Prompts to a chat model behind an OpenAI-compatible address: asked once each, with waits, a journal and a bill.

Each answer is a line of the journal, so a stopped run goes on where it was, and nothing is paid twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from embedtune import files
from embedtune.encoder import calls
from embedtune.encoder.calls import Note, Refused
from embedtune.errors import UserError

GIVE_UP = 5  # prompts refused with none answered before them
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
MOST_STARTS = 20  # places in an answer where JSON may begin
Read = Callable[[str], list[str]]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Whom to ask. The key is OPENAI_API_KEY of the environment; a service of one's own needs none."""

    address: str  # of an OpenAI-compatible service, http://localhost:8000/v1 for example
    model: str  # the name the service knows it by
    concurrency: int = 4  # prompts under way at once


@dataclass
class Bill:
    """What was asked in this run and what it cost; `resumed` prompts were answered by earlier ones."""

    prices: tuple[float, float] | None = None  # per million tokens, of the prompts and of the answers
    answered: int = 0
    resumed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    requests: int = 0
    retries: int = 0

    def add(self, answer: Answer) -> None:
        """Count what came back for a prompt of this run."""
        self.answered += not answer.refused
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.requests += answer.requests
        self.retries += answer.retries

    @property
    def cost(self) -> float | None:
        """What this run cost, in the currency of the prices; None without prices."""
        if self.prices is None:
            return None
        return (self.tokens_in * self.prices[0] + self.tokens_out * self.prices[1]) / 1e6

    def line(self, things: str, journal: Path) -> str:
        """All of it in a line; `things` is what was asked about."""
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        spent = f"{self.tokens_in:,} tokens read, {self.tokens_out:,} written in {self.requests:,} requests{cost}"
        return f"{self.answered:,} {things} asked about, {self.resumed:,} taken from {journal}: {spent}"


class Answer(NamedTuple):
    """The texts in what came back for a prompt; `refused` is what the service said where it did not want it."""

    texts: list[str]
    tokens_in: int
    tokens_out: int
    refused: str = ""
    requests: int = 0
    retries: int = 0


def ask(
    prompts: Sequence[str], chat: Chat, read: Read, journal: Path, *, bill: Bill, note: Note = lambda text: None
) -> Generator[Answer, None, None]:
    """An answer to each prompt, in their order and as they come; `read` finds its texts in what the model said.

    `journal` is a .jsonl that only ever grows: a prompt that stands in it for this model is not asked again; a line
    that a kill tore is left out. Busy services are asked again, with waits. Raises UserError where the package, the
    key or the service is missing, or the service refuses GIVE_UP prompts and has answered none.
    """
    where = f"{chat.model} at {calls.scrub(chat.address)}"
    client, _ = calls.openai_client(chat.address, where, note)
    done = _read_journal(journal)
    keys = [_key(prompt, chat) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts) if key not in done}
    bill.resumed += len(set(keys)) - len(missing)
    if bill.resumed:
        note(f"{journal}: {bill.resumed:,} of {len(set(keys)):,} prompts are answered there already")
    refused = 0
    with closing(_ask_all(client, missing.values(), chat, read, (where, note))) as fresh:
        for key in keys:
            if key not in done:
                answer = done[key] = next(fresh)  # of this prompt: both go through the missing ones in one order
                bill.add(answer)
                refused += bool(answer.refused)
                if refused >= min(GIVE_UP, len(missing)) and not bill.answered:
                    raise UserError(answer.refused, where=where, fix="check the model's name and what it takes")
                if not answer.refused:
                    _append(journal, key, answer)
                    note(f"{where}: {bill.answered:,} of {len(missing):,} prompts, {bill.tokens_out:,} tokens written")
            yield done[key]


def _key(prompt: str, chat: Chat) -> str:
    return hashlib.sha256(f"{chat.model}\0{prompt}".encode("utf-8", "surrogatepass")).hexdigest()


def _read_journal(journal: Path) -> dict[str, Answer]:
    """The answers by key; lines that are torn or not ours are left out."""
    done: dict[str, Answer] = {}
    if not journal.exists():
        return done
    try:
        content = journal.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(journal)) from error
    for line in content.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            texts = [text for text in entry["texts"] if isinstance(text, str)]
            done[str(entry["key"])] = Answer(texts, int(entry["tokens_in"]), int(entry["tokens_out"]))
    if content and not content.endswith(b"\n"):
        files.append_line(journal, "")  # so that the torn line does not swallow the next
    return done


def _append(journal: Path, key: str, answer: Answer) -> None:
    entry = {"key": key, "texts": answer.texts, "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
    files.append_line(journal, json.dumps(entry))


def _ask_all(
    client: Any, prompts: Iterable[str], chat: Chat, read: Read, told: tuple[str, Note]
) -> Generator[Answer, None, None]:
    """Answers in the order of the prompts, `concurrency` under way at once."""
    under_way: deque[Future[Answer]] = deque()
    waiting = iter(prompts)
    stop = Event()

    def one(prompt: str) -> Answer:
        usage = {"requests": 0, "retries": 0}

        def request() -> Any:
            if stop.is_set():
                raise CancelledError  # ends the attempts of the others when one has failed for good
            messages = [{"role": "user", "content": prompt}]
            return client.chat.completions.with_raw_response.create(model=chat.model, messages=messages)

        try:
            raw = calls.call(request, *told, usage)
        except Refused as refused:
            return Answer([], 0, 0, str(refused), usage["requests"], usage["retries"])
        body = calls.body(raw, told[0])
        return Answer(read(content(body)), *_tokens(body), "", usage["requests"], usage["retries"])

    with ThreadPoolExecutor(chat.concurrency) as pool:
        try:
            while True:
                room = chat.concurrency - len(under_way)
                under_way.extend(pool.submit(one, prompt) for prompt in islice(waiting, room))
                if not under_way:
                    return
                yield under_way.popleft().result()
        finally:
            stop.set()


def _tokens(answer: Mapping[str, Any]) -> tuple[int, int]:
    used = answer.get("usage")
    used = used if isinstance(used, dict) else {}
    return calls.whole_number(used.get("prompt_tokens")), calls.whole_number(used.get("completion_tokens"))


def content(answer: Mapping[str, Any]) -> str:
    """The text of a chat answer, without what the model says while it thinks; '' where it has none."""
    with suppress(KeyError, IndexError, TypeError):
        said = answer["choices"][0]["message"]["content"]
        if isinstance(said, str):
            return THINKING.sub("", said)
    return ""


def in_json(text: str, opening: str, find: Callable[[Any], list[str] | None]) -> list[str]:
    """What `find` makes of the first JSON value in `text` of which it does not make None; [] where there is none.

    `opening`: the characters a value may begin with.
    """
    for start in [place for place, letter in enumerate(text) if letter in opening][:MOST_STARTS]:
        with suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder().raw_decode(text[start:])
            if (found := find(value)) is not None:
                return found
    return []
