"""Questions that a chat model writes for passages, behind an OpenAI-compatible address that the user names.

Each finished passage is a line of a journal, so a stopped run goes on where it was, and nothing is paid twice.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from embedtune import files, keyed
from embedtune.data.clean import text_hash
from embedtune.data.lines import Problem
from embedtune.data.read import Counts
from embedtune.encoder import calls
from embedtune.encoder.calls import Note, Refused
from embedtune.enrich.documents import Document
from embedtune.enrich.sentences import count, plain
from embedtune.enrich.spans import Grown, cut, parts
from embedtune.errors import UserError

PROMPT = """\
Below is a passage. Write {count} question(s) that a person who has never seen it could type into a search engine and \
that this passage answers. Use other words than the passage where you can, name the things asked about, and do not \
mention the passage itself. Answer with a JSON list of strings and nothing else.

Passage:
{passage}"""
# These make sense only to one who has the passage at hand.
ABOUT_ITSELF = re.compile(r"\b(?:the|this|given|above)\s+(?:passage|text|article|excerpt|document|paragraph)\b", re.I)
SHORTEST_PASSAGE = 15  # words
LONGEST_QUESTION = 48  # words
BULLET = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,3}[.):]|[Qq]\d*[.:])\s*")
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
GIVE_UP = 5  # passages refused with none taken before them


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Whom to ask, and for what. The key is OPENAI_API_KEY of the environment; a service of one's own needs none."""

    address: str  # of an OpenAI-compatible service, http://localhost:8000/v1 for example
    model: str  # the name the service knows it by
    per_passage: int = 2  # questions asked for
    most: int = 1000  # passages, a sample of all
    max_words: int = 180  # of a passage
    concurrency: int = 4  # passages under way at once
    prompt: str = PROMPT  # with {passage}, and {count} if wanted
    seed: int = 0  # of the sample


@dataclass
class Tally:
    """What was asked and what it cost; tokens "earlier" were paid for by the runs before this one."""

    prices: tuple[float, float] | None = None  # per million tokens, of the question and of the answer
    passages: int = 0
    resumed: int = 0
    questions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    earlier_in: int = 0
    earlier_out: int = 0
    requests: int = 0
    retries: int = 0

    def add(self, finished: Finished) -> None:
        """Count a passage that was asked about in this run."""
        self.passages += not finished.refused
        self.tokens_in += finished.tokens_in
        self.tokens_out += finished.tokens_out
        self.requests += finished.requests
        self.retries += finished.retries

    @property
    def cost(self) -> float | None:
        """What this run cost, in the currency of the prices; None without prices."""
        if self.prices is None:
            return None
        return (self.tokens_in * self.prices[0] + self.tokens_out * self.prices[1]) / 1e6


class Passage(NamedTuple):
    """A text to be asked about and where it stands."""

    group: str
    text: str


class Finished(NamedTuple):
    """What came back for a passage; `refused` is what the service said where it did not want it."""

    questions: list[str]
    tokens_in: int
    tokens_out: int
    refused: str = ""
    requests: int = 0
    retries: int = 0


def passages(documents: Iterable[Document], asking: Asking, counts: Counts | None = None) -> list[Passage]:
    """A sample of at most `asking.most` distinct passages of whole sentences, in the order of the documents.

    Which passages are taken depends on their text and the seed alone. One of fewer than SHORTEST_PASSAGE words is
    never taken, and is counted in `counts.rejected`.
    """
    heap: list[tuple[int, int, Passage]] = []
    drawn: set[int] = set()
    number = 0
    for document in documents:
        for part in parts(document.sentences, asking.max_words // 2):
            passage = Passage(document.group, cut(part, 0, asking.max_words))
            number += 1
            draw = int(keyed.key(text_hash(passage.text), asking.seed)[0])
            if count(passage.text) < SHORTEST_PASSAGE:
                if counts is not None:
                    counts.rows += 1
                    counts.note(counts.rejected, Problem("passage too short", "", fix=""), passage.group)
            elif draw not in drawn:
                heapq.heappush(heap, (-draw, number, passage))
                drawn.add(draw)
                if len(heap) > asking.most:
                    drawn.discard(-heapq.heappop(heap)[0])
    return [passage for _, _, passage in sorted(heap, key=lambda item: item[1])]


def write_questions(
    wanted: Sequence[Passage],
    asking: Asking,
    journal: Path,
    *,
    tally: Tally | None = None,
    counts: Counts | None = None,
    note: Note = lambda text: None,
) -> Iterator[Grown]:
    """Ask for questions about each passage and yield them as pairs (question, passage), in the passages' order.

    `journal` is a .jsonl that only ever grows: passages that stand in it, asked with the same prompt of the same
    model, are not asked again; a line that a kill tore is left out. `counts` gets a row per passage, and under
    `rejected` why one gave no pair. Busy services are asked again, with waits. Raises UserError where the package,
    the key or the service is missing, or the service refuses GIVE_UP passages and has taken none.
    """
    told = tally if tally is not None else Tally()
    sums = counts if counts is not None else Counts()
    _check(asking)
    where = f"{asking.model} at {calls.scrub(asking.address)}"
    client, _ = calls.openai_client(asking.address, where, note)
    done = _read_journal(journal)
    keys = [_key(passage, asking) for passage in wanted]
    missing = {key: passage for key, passage in zip(keys, wanted) if key not in done}
    told.resumed = len(set(keys)) - len(missing)
    for key in set(keys) & done.keys():
        told.earlier_in += done[key].tokens_in
        told.earlier_out += done[key].tokens_out
    if told.resumed:
        note(f"{journal}: {told.resumed:,} of {len(wanted):,} passages are there already")
    refused = 0
    with closing(_ask_all(client, missing, asking, where, note)) as fresh:
        for key, passage in zip(keys, wanted):
            while key not in done:
                finished_key, finished = next(fresh)
                done[finished_key] = finished
                told.add(finished)
                refused += bool(finished.refused)
                if refused >= min(GIVE_UP, len(missing)) and not told.passages:
                    raise UserError(finished.refused, where=where, fix="check the model's name and what it takes")
                if not finished.refused:
                    _append(journal, finished_key, finished)
                    note(f"{where}: {told.passages:,} of {len(missing):,} passages, {told.tokens_out:,} tokens written")
            yield from _pairs(passage, done[key], asking, told, sums)


def _check(asking: Asking) -> None:
    problems = [
        f"{name}: must be 1 or more, not {value}"
        for name, value in (
            ("--per-passage", asking.per_passage),
            ("--most", asking.most),
            ("--max-words", asking.max_words),
            ("--concurrency", asking.concurrency),
        )
        if value < 1
    ]
    if not asking.model.strip():
        problems.append("--model: must name a model that the service has")
    if "{passage}" not in asking.prompt:
        problems.append("--prompt: must hold {passage}, the place for the text")
    if problems:
        raise UserError("questions cannot be asked for with these settings", details=problems)


def _key(passage: Passage, asking: Asking) -> str:
    asked = (asking.model, asking.prompt, str(asking.per_passage), passage.text)
    return hashlib.sha256("\0".join(asked).encode("utf-8", "surrogatepass")).hexdigest()


def _read_journal(journal: Path) -> dict[str, Finished]:
    """The finished passages by key; lines that are torn or not ours are left out."""
    done: dict[str, Finished] = {}
    if not journal.exists():
        return done
    try:
        content = journal.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(journal)) from error
    for line in content.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            questions = [question for question in entry["questions"] if isinstance(question, str)]
            done[str(entry["key"])] = Finished(questions, int(entry["tokens_in"]), int(entry["tokens_out"]))
    if content and not content.endswith(b"\n"):
        files.append_line(journal, "")  # so that the torn line does not swallow the next
    return done


def _append(journal: Path, key: str, finished: Finished) -> None:
    entry = {"key": key, "questions": finished.questions} | {
        "tokens_in": finished.tokens_in,
        "tokens_out": finished.tokens_out,
    }
    files.append_line(journal, json.dumps(entry))


def _ask_all(
    client: Any, missing: dict[str, Passage], asking: Asking, where: str, note: Note
) -> Generator[tuple[str, Finished], None, None]:
    """Finished passages in the order they were asked for, `concurrency` under way at once."""
    under_way: deque[tuple[str, Future[Finished]]] = deque()
    waiting = iter(missing.items())
    stop = Event()

    def ask(passage: Passage) -> Finished:
        # Not str.format: both the passage and the user's prompt may hold braces.
        prompt = asking.prompt.replace("{count}", str(asking.per_passage)).replace("{passage}", passage.text)
        usage = {"requests": 0, "retries": 0}

        def request() -> Any:
            if stop.is_set():
                raise CancelledError  # ends the attempts of the others when one has failed for good
            messages = [{"role": "user", "content": prompt}]
            return client.chat.completions.with_raw_response.create(model=asking.model, messages=messages)

        try:
            raw = calls.call(request, where, note, usage)
        except Refused as refused:
            return Finished([], 0, 0, str(refused), usage["requests"], usage["retries"])
        answer = calls.body(raw, where)
        return Finished(parse(_content(answer)), *_tokens(answer), "", usage["requests"], usage["retries"])

    with ThreadPoolExecutor(asking.concurrency) as pool:
        try:
            while True:
                while len(under_way) < asking.concurrency and (item := next(waiting, None)):
                    under_way.append((item[0], pool.submit(ask, item[1])))
                if not under_way:
                    return
                key, future = under_way.popleft()
                yield key, future.result()
        finally:
            stop.set()


def _tokens(answer: dict[str, Any]) -> tuple[int, int]:
    used = answer.get("usage")
    used = used if isinstance(used, dict) else {}
    return calls.whole_number(used.get("prompt_tokens")), calls.whole_number(used.get("completion_tokens"))


def _content(answer: dict[str, Any]) -> str:
    """The text of a chat answer; '' where it has none."""
    with suppress(KeyError, IndexError, TypeError):
        content = answer["choices"][0]["message"]["content"]
        if isinstance(content, str):
            return content
    return ""


def parse(text: str) -> list[str]:
    """The questions in a model's answer: a JSON list or object in it, else its lines that are questions.

    What a model says while it thinks, and fences, numbers and bullets, are taken off. Nothing found: [].
    """
    text = THINKING.sub("", text)
    for start in [match.start() for match in re.finditer(r"[\[{]", text)][:20]:
        with suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder().raw_decode(text[start:])
            if found := _strings(value):
                return found
    lines = [BULLET.sub("", line).strip(" \t\"'*`,") for line in text.splitlines()]
    found = [" ".join(line.split()) for line in lines if line.endswith(("?", "\uff1f", "\u061f"))]
    # A JSON list that was cut off: the strings in it that are whole.
    return found or [json.loads(f'"{each}"', strict=False) for each in re.findall(r'"([^"\\\n]{2,}[?\uff1f])"', text)]


def _strings(value: Any) -> list[str]:
    """The strings of a list, of {"questions": [...]}, or of a list of {"question": ...}."""
    if isinstance(value, dict):
        inner = next((each for name, each in value.items() if name.lower().startswith(("question", "quer"))), None)
        return [inner] if isinstance(inner, str) else _strings(inner) if isinstance(inner, list) else []
    if isinstance(value, list):
        flat = [each if isinstance(each, str) else next(iter(_strings(each)), "") for each in value]
        return [" ".join(each.split()) for each in flat if each.strip()]
    return []


def _pairs(passage: Passage, finished: Finished, asking: Asking, told: Tally, sums: Counts) -> Iterator[Grown]:
    """The questions that can be used, each once, at most as many as were asked for."""
    kept: dict[str, str] = {}
    reason = "refused by the service" if finished.refused else "no question in the answer"
    for question in finished.questions:
        if problem := _problem(question, passage.text):
            reason = problem
        elif len(kept) < asking.per_passage:
            kept.setdefault(plain(question), question)
    sums.rows += 1
    if not kept:
        sums.note(sums.rejected, Problem(reason, reason, fix=""), passage.group)
        return
    sums.used += 1
    told.questions += len(kept)
    yield from (Grown(question, passage.text, passage.group, "questions") for question in kept.values())


def _problem(question: str, passage: str) -> str:
    """Why a question is of no use, '' where it is."""
    half = any("\ud800" <= letter <= "\udfff" for letter in question)  # of a surrogate pair, which no file can hold
    if half or not any(map(str.isalpha, question)):
        return "no question in the answer"
    if count(question) > LONGEST_QUESTION:
        return "question too long"
    if ABOUT_ITSELF.search(question):
        return "question about the passage itself"
    return "question is a part of the passage" if plain(question) in plain(passage) else ""
