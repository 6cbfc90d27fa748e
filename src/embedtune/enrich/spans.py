"""Pairs from raw text alone: each generator is a pure function of a document, a seed and a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedtune import keyed
from embedtune.data.lines import Problem
from embedtune.data.read import Counts, Row
from embedtune.enrich.documents import Document, Lines, documents
from embedtune.enrich.sentences import count, plain, sentences, words
from embedtune.enrich.write import write_rows
from embedtune.errors import UserError, did_you_mean


class Sizes(NamedTuple):
    """Bounds in words: what is shorter than `min_words` is no anchor, what is longer than `max_words` is cut.

    A positive has at least twice `min_words`.
    """

    min_words: int
    max_words: int


class Refusal(NamedTuple):
    """Why a document gives no such pair, in a few words; it is counted under them."""

    reason: str


@dataclass(frozen=True, slots=True)
class Grown:
    """A pair, the document it came from (`group`: file and line) and what made it."""

    anchor: str
    positive: str
    group: str
    generator: str


# (anchor, positive); or why not; or None where the document has no further pair of this kind.
Made = tuple[str, str] | Refusal | None
Generator = Callable[[Document, Sizes, int, int], Made]

SHORT = Refusal("too short")
NO_TITLE = Refusal("no title")
SHORT_TITLE = Refusal("title of one word")
SHORT_LEAD = Refusal("first sentence too short")
REPEATED = Refusal("repeated")
SAME = Refusal("anchor and positive are the same")
INSIDE = Refusal("anchor stands in the positive")
LONGEST = 8  # times min_words: a sentence that is an anchor is cut to this


def crop(document: Document, sizes: Sizes, seed: int, number: int) -> Made:
    """Two spans of a document, drawn independently; they may overlap (2112.09118).

    Both lie in one stretch of twice `max_words`, so that they are about the same thing. The anchor has min_words
    to three times that, the positive twice min_words to max_words.
    """
    least, most = sizes
    total = len(document.words)
    if total < 2 * least:
        return SHORT if number == 0 else None
    draw = _draws(document, seed, "crop", number)
    width = min(total, 2 * most)
    first = _between(draw[0], 0, total - width)

    def span(length: int, place: float) -> str:
        start = first + _between(place, 0, width - length)
        return document.text[document.words[start][0] : document.words[start + length - 1][1]]

    anchor = span(_between(draw[1], least, min(3 * least, width // 2)), draw[2])
    return anchor, span(_between(draw[3], 2 * least, min(most, width)), draw[4])


def cloze(document: Document, sizes: Sizes, seed: int, number: int) -> Made:
    """A sentence and what stands around it, the sentence taken out (the inverse cloze task, 1906.00300)."""
    found = document.sentences
    able = [i for i, sentence in enumerate(found) if count(sentence) >= sizes.min_words]
    if len(found) < 2 or not able:
        return SHORT if number == 0 else None
    if number >= len(able):
        return None
    at = able[_shuffled(document, seed, "cloze", number, len(able))]
    draw = _draws(document, seed, "cloze", number)
    room = _between(draw[0], sizes.max_words // 2, sizes.max_words)
    longest = LONGEST * sizes.min_words
    spare = max(0, count(found[at]) - longest)
    anchor = cut(found[at], _between(draw[1], 0, spare), longest)
    before, after = [], []
    left, right = at - 1, at + 1
    while room > 0 and (left >= 0 or right < len(found)):
        # The nearest first, taking turns, so that the sentence stood about in the middle.
        if right < len(found) and (left < 0 or right - at <= at - left):
            after.append(cut(found[right], 0, room))
            room -= count(after[-1])
            right += 1
        else:
            length = count(found[left])
            before.append(cut(found[left], max(0, length - room), room))
            room -= min(length, room)
            left -= 1
    return _checked(anchor, [*reversed(before), *after], sizes)


def title(document: Document, sizes: Sizes, seed: int, number: int) -> Made:
    """The title, or a first line that looks like one, and the text; sentences that have the title in them go."""
    if number > 0:
        return None
    if not document.title:
        return NO_TITLE
    if count(document.title) < 2:
        return SHORT_TITLE
    return _checked(cut(document.title, 0, LONGEST * sizes.min_words), document.sentences, sizes)


def next_paragraph(document: Document, sizes: Sizes, seed: int, number: int) -> Made:
    """A paragraph and the one after it; a text of one paragraph is first cut into parts of whole sentences."""
    whole = len(document.paragraphs) == 1
    found = parts(document.sentences, sizes.max_words // 3) if whole else document.paragraphs
    found = [part for part in found if count(part) >= sizes.min_words]
    if len(found) < 2:
        return SHORT if number == 0 else None
    if number >= len(found) - 1:
        return None
    at = _shuffled(document, seed, "next", number, len(found) - 1)
    return _checked(cut(found[at], 0, sizes.max_words), sentences(found[at + 1]), sizes)


def lead(document: Document, sizes: Sizes, seed: int, number: int) -> Made:
    """The first sentence, which often sums up, and the rest; after the document its other paragraphs take turns."""
    if number == 0:
        first, *rest = document.sentences
    else:
        able = [part for part in map(sentences, document.paragraphs[1:]) if len(part) > 1]
        if number > len(able):
            return None
        first, *rest = able[_shuffled(document, seed, "lead", number - 1, len(able))]
    if count(first) < sizes.min_words:
        return SHORT_LEAD
    return _checked(cut(first, 0, LONGEST * sizes.min_words), rest, sizes)


GENERATORS: dict[str, Generator] = {
    "crop": crop,
    "cloze": cloze,
    "title": title,
    "next": next_paragraph,
    "lead": lead,
}


def make_pairs(
    rows: Iterable[Row],
    generators: Sequence[str] = ("crop", "cloze"),
    per_document: int = 4,
    seed: int = 0,
    min_words: int = 5,
    max_words: int = 180,
    lines: Lines = "auto",
    counts: Counts | None = None,
) -> Iterator[Grown]:
    """Stream pairs out of rows of `read_texts`: `pairs_of` their `documents`, those that repeat another left out."""
    tally = counts if counts is not None else Counts()
    found = once(documents(rows, lines, tally), tally)
    return pairs_of(found, generators, per_document, seed, min_words, max_words, tally)


def once(found: Iterable[Document], counts: Counts) -> Iterator[Document]:
    """The documents without those that repeat an earlier one, which are counted."""
    seen: set[int] = set()
    for document in found:
        if document.key in seen:
            _refuse(counts, Refusal("repeated document"), document)
        else:
            seen.add(document.key)
            yield document


def pairs_of(
    found: Iterable[Document],
    generators: Sequence[str] = ("crop", "cloze"),
    per_document: int = 4,
    seed: int = 0,
    min_words: int = 5,
    max_words: int = 180,
    counts: Counts | None = None,
) -> Iterator[Grown]:
    """Stream pairs out of distinct documents (`once`): at most `per_document` of each kind from each.

    Same documents, same seed: same pairs, whatever order they come in. `counts` gets one row per attempt, and in
    `rejected` why an attempt gave none.
    Raises UserError for an unknown generator or sizes that no pair can have.
    """
    tally = counts if counts is not None else Counts()
    sizes = Sizes(min_words, max_words)
    _check(generators, per_document, sizes)
    for document in found:
        for name in generators:
            yield from _from_document(document, name, per_document, seed, sizes, tally)


def _from_document(document: Document, name: str, most: int, seed: int, sizes: Sizes, tally: Counts) -> Iterator[Grown]:
    given: set[tuple[str, str]] = set()
    for number in range(most):
        made = GENERATORS[name](document, sizes, seed, number)
        if made is None:
            return
        if not isinstance(made, Refusal):
            same = plain(made[0]), plain(made[1])
            made = SAME if same[0] == same[1] else REPEATED if same in given else made
            given.add(same)
        if isinstance(made, Refusal):
            _refuse(tally, Refusal(f"{name}: {made.reason}"), document)
            continue
        tally.rows += 1
        tally.used += 1
        yield Grown(made[0], made[1], document.group, name)


def write_pairs(path: Path, pairs: Iterable[Grown], counts: Counts | None = None) -> int:
    """Write pairs as .jsonl {anchor, positive, group, generator}, and return how many.

    Raises UserError where there are none, or the place cannot be written.
    """
    rows = (
        {"anchor": pair.anchor, "positive": pair.positive, "group": pair.group, "generator": pair.generator}
        for pair in pairs
    )
    return write_rows(path, rows, counts)


def _check(generators: Sequence[str], per_document: int, sizes: Sizes) -> None:
    problems = [
        f"--generators: there is no {name!r}{did_you_mean(name, list(GENERATORS))}; there are {', '.join(GENERATORS)}"
        for name in generators
        if name not in GENERATORS
    ]
    if not generators:
        problems.append("--generators: none named")
    if per_document < 1:
        problems.append(f"--per-document: must be 1 or more, not {per_document}")
    if sizes.min_words < 1 or sizes.max_words < 4 * sizes.min_words:
        problems.append(
            f"--min-words, --max-words: must be 1 or more and at least four times that, not {sizes.min_words} "
            f"and {sizes.max_words}"
        )
    if problems:
        raise UserError("pairs cannot be made with these settings", details=problems)


def _refuse(tally: Counts, refusal: Refusal, document: Document) -> None:
    tally.rows += 1
    tally.note(tally.rejected, Problem(refusal.reason, refusal.reason, fix=""), document.group)


def _draws(document: Document, seed: int, name: str, number: int) -> list[float]:
    """Five numbers in [0, 1) that belong to this attempt alone."""
    keys = keyed.key(document.key, seed, _salt(name), number, np.arange(5))
    return keyed.uniform(keys).tolist()


def _shuffled(document: Document, seed: int, name: str, number: int, size: int) -> int:
    """The `number`-th of 0..size-1 in an order that belongs to this document."""
    keys = keyed.key(document.key, seed, _salt(name), np.arange(size))
    return int(np.argsort(keys, kind="stable")[number])


def _salt(name: str) -> int:
    return int.from_bytes(name.encode(), "big")


def _between(share: float, low: int, high: int) -> int:
    """An integer of low..high (low where high is smaller) at a share in [0, 1) of the way."""
    return low + int(share * max(1, high - low + 1))


def cut(text: str, first: int, most: int) -> str:
    """At most `most` words of a text, from word `first` on."""
    if first == 0 and count(text) <= most:
        return text
    spans = words(text)[first : first + most]
    return text[spans[0][0] : spans[-1][1]] if spans else ""


def parts(found: Sequence[str], least: int) -> list[str]:
    """Runs of whole sentences of at least `least` words; the last may have fewer."""
    runs: list[list[str]] = [[]]
    length = 0
    for sentence in found:
        if length >= least:
            runs.append([])
            length = 0
        runs[-1].append(sentence)
        length += count(sentence)
    return [" ".join(run) for run in runs]


def _checked(anchor: str, rest: Sequence[str], sizes: Sizes) -> Made:
    """The anchor with as much of the rest as is allowed, less the sentences that give it away."""
    needle = plain(anchor)
    kept, room = [], sizes.max_words
    for sentence in rest:
        if room <= 0:
            break
        if needle not in plain(sentence):
            kept.append(cut(sentence, 0, room))
            room -= count(kept[-1])
    positive = " ".join(kept)
    if sizes.max_words - room < 2 * sizes.min_words:
        return SHORT
    # What is left may still hold it over the border of two sentences.
    return INSIDE if needle in plain(positive) else (anchor, positive)
