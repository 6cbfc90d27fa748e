"""Questions that a chat model writes for passages of raw text: pairs in the words of people who search."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from embedtune import keyed
from embedtune.data.clean import text_hash
from embedtune.data.lines import Problem
from embedtune.data.read import Counts
from embedtune.encoder.calls import Note
from embedtune.enrich.ask import Answer, Bill, Chat, ask, in_json
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


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What to ask for."""

    per_passage: int = 2  # questions
    most: int = 1000  # passages, a sample of all
    max_words: int = 180  # of a passage
    prompt: str = PROMPT  # with {passage}, and {count} if wanted
    seed: int = 0  # of the sample


class Passage(NamedTuple):
    """A text to be asked about and where it stands."""

    group: str
    text: str


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
    chat: Chat,
    asking: Asking,
    journal: Path,
    *,
    bill: Bill | None = None,
    counts: Counts | None = None,
    note: Note = lambda text: None,
) -> Iterator[Grown]:
    """Ask for questions about each passage and yield them as pairs (question, passage), in the passages' order.

    What is answered stays in `journal`; see `ask.ask` for that and for what is raised. `counts` gets a row per
    passage, and under `rejected` why one gave no pair.
    """
    sums = counts if counts is not None else Counts()
    _check(chat, asking)
    # Not str.format: both the passage and the user's prompt may hold braces.
    prompt = asking.prompt.replace("{count}", str(asking.per_passage))
    prompts = [prompt.replace("{passage}", passage.text) for passage in wanted]
    with closing(ask(prompts, chat, parse, journal, bill=bill or Bill(), note=note)) as answers:
        for passage, answer in zip(wanted, answers, strict=True):
            yield from _pairs(passage, answer, asking.per_passage, sums)


def _check(chat: Chat, asking: Asking) -> None:
    problems = [
        f"{name}: must be 1 or more, not {value}"
        for name, value in (
            ("--per-passage", asking.per_passage),
            ("--most", asking.most),
            ("--max-words", asking.max_words),
            ("--concurrency", chat.concurrency),
        )
        if value < 1
    ]
    if not chat.model.strip():
        problems.append("--model: must name a model that the service has")
    if "{passage}" not in asking.prompt:
        problems.append("--prompt: must hold {passage}, the place for the text")
    if problems:
        raise UserError("questions cannot be asked for with these settings", details=problems)


def parse(text: str) -> list[str]:
    """The questions in a model's answer: a JSON list or object in it, else its lines that are questions.

    Fences, numbers and bullets are taken off. Nothing found: [].
    """
    if found := in_json(text, "[{", lambda value: _strings(value) or None):
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


def _pairs(passage: Passage, answer: Answer, most: int, sums: Counts) -> Iterator[Grown]:
    """The questions that can be used, each once, at most `most`."""
    kept: dict[str, str] = {}
    reason = "refused by the service" if answer.refused else "no question in the answer"
    for question in answer.texts:
        if problem := _problem(question, passage.text):
            reason = problem
        elif len(kept) < most:
            kept.setdefault(plain(question), question)
    sums.rows += 1
    if not kept:
        sums.note(sums.rejected, Problem(reason, reason, fix=""), passage.group)
        return
    sums.used += 1
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
