"""Rows to documents: which lines belong together, what is a title, where paragraphs and sentences are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Literal, get_args

from embedtune.data.clean import text_hash
from embedtune.data.lines import ending
from embedtune.data.read import Counts, Row
from embedtune.enrich.sentences import ITEM, count, plain, sentences, words
from embedtune.errors import UserError

Lines = Literal["auto", "apart", "together"]

APART = 32  # lines of a .txt without a blank line that can still be one document
MOST_LINES = 4096  # of one document held in memory; a longer one is taken in pieces
TITLE_WORDS = 2, 20
TITLE_ENDS = ".!;:,\u3002\uff01\u2026\u0964"


@dataclass(frozen=True)
class Document:
    """A title, or "", and paragraphs, none of them blank, whitespace collapsed; `group` names where it stands."""

    group: str
    title: str
    paragraphs: tuple[str, ...]

    @cached_property
    def key(self) -> int:
        """64 bits of its content: what is drawn from it depends on neither its place nor its file."""
        return text_hash("\n".join((self.title, *self.paragraphs)))

    @cached_property
    def text(self) -> str:
        """The paragraphs, joined by spaces."""
        return " ".join(self.paragraphs)

    @cached_property
    def words(self) -> list[tuple[int, int]]:
        """Where each word of `text` begins and ends."""
        return words(self.text)

    @cached_property
    def sentences(self) -> list[str]:
        """The sentences of all paragraphs, in order."""
        return [sentence for paragraph in self.paragraphs for sentence in sentences(paragraph)]


def documents(rows: Iterable[Row], lines: Lines = "auto", counts: Counts | None = None) -> Iterator[Document]:
    """Group rows of `read_texts` into documents, as a stream; a column "title" is the title.

    lines: "together" takes the lines of a .txt between two blank lines as one document, "apart" takes each line as
    one. "auto" is "together", but a .txt that goes on for more than APART lines before its first blank line is
    taken to have a text of its own in every line (and `counts.notes` says so): pairs over the borders of unrelated
    texts would teach what is wrong.
    """
    if lines not in get_args(Lines):
        raise UserError(f"must be one of {', '.join(get_args(Lines))}, not {lines!r}", where="--lines")
    before = None
    for (file, _), group in groupby(rows, key=lambda row: (row.file, row.document)):
        pieces = _pieces(group)
        held = next(pieces)
        first, before = file != before, file
        plain_text = ending(Path(file))[0] == ".txt"
        if plain_text and (lines == "apart" or (lines == "auto" and first and len(held) > APART)):
            if counts is not None and lines == "auto":
                what = f"no blank line in its first {len(held):,} lines, so each is taken as a text of its own"
                counts.notes.append(f"{file}: {what}")
            pieces = ([row] for row in chain(held, chain.from_iterable(pieces)))
        else:
            pieces = chain([held], pieces)
        yield from map(_document, pieces)


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while piece := list(islice(rows, MOST_LINES)):
        yield piece


def _document(rows: list[Row]) -> Document:
    first = rows[0]
    group = f"{Path(first.file).name}:{first.number}"
    title = first.values.get("title")
    title = " ".join(title.split()) if isinstance(title, str) else ""
    texts = [str(row.values["text"]) for row in rows]
    found = _paragraphs(texts[0]) if len(texts) == 1 else _unwrap([" ".join(text.split()) for text in texts])
    if not title and _is_title(found):
        title = found[0]
    if title and len(found) > 1 and plain(found[0]) == plain(title):
        found = found[1:]
    return Document(group, title, tuple(found))


def _paragraphs(text: str) -> list[str]:
    """The parts between blank lines; where there is none, the lines, mended where they were wrapped."""
    parts = re.split(r"\n\s*\n", text)
    if len(parts) > 1:
        return [" ".join(part.split()) for part in parts if part.strip()]
    return _unwrap([" ".join(line.split()) for line in text.splitlines() if line.strip()])


def _unwrap(lines: list[str]) -> list[str]:
    """Lines as paragraphs; lines that were broken at a column (they go on with small letters) are joined."""
    goes_on = [a[-1] not in ".!?:;\"')" for a in lines[:-1]]
    wrapped = sum(on and b[0].islower() for on, b in zip(goes_on, lines[1:]))
    if wrapped * 3 < len(goes_on) or not wrapped:
        return lines
    joined = [lines[0]]
    for on, line in zip(goes_on, lines[1:]):
        if on and not ITEM.match(line + " "):
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def _is_title(paragraphs: list[str]) -> bool:
    """Whether the first paragraph looks like a title of the rest: short, no sentence, followed by longer text."""
    if len(paragraphs) < 2:
        return False
    line, length = paragraphs[0], count(paragraphs[0])
    sound = line[0].isalnum() and not line[0].islower() and line[-1] not in TITLE_ENDS and any(map(str.isalpha, line))
    few = TITLE_WORDS[0] <= length <= TITLE_WORDS[1]
    return sound and few and count(" ".join(paragraphs[1:4])) >= 2 * length
