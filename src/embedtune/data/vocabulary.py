"""Words of the text that shatter into many pieces, and how much a vocabulary shatters it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from embedtune.data.read import Row
from embedtune.data.tokens import pieces, uncut

MOST_WORDS = 1_000_000  # distinct words kept while counting; beyond it the rarest are forgotten
MIN_COUNT = 5


@dataclass(frozen=True)
class Words:
    """How often each word occurs, as the tokenizer itself splits and normalises the text."""

    counts: Counter[str]
    forgotten: int


def count_words(rows: Iterable[Row], tokenizer: Any) -> Words:
    """Count the words of a stream of text rows. Memory is bounded: the rarest words are forgotten, and counted."""
    backend = tokenizer.backend_tokenizer
    counts: Counter[str] = Counter()
    forgotten = 0
    for row in rows:
        for text in pieces(row.values["text"]):
            counts.update(_words(backend, text))
        if len(counts) > 2 * MOST_WORDS:
            kept = Counter(dict(counts.most_common(MOST_WORDS)))
            forgotten += len(counts) - len(kept)
            counts = kept
    return Words(counts, forgotten)


def _words(backend: Any, text: str) -> Iterator[str]:
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    split = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, (0, 0))]
    return (word for word, _ in split)


def shattered(words: Words, tokenizer: Any, most: int) -> list[str]:
    """The `most` words that cost the most extra pieces (count times pieces beyond the first), best first.

    Only words of letters, at least 4 characters, seen at least 5 times, split into at least 3 pieces.
    """
    known, backend = tokenizer.get_vocab(), uncut(tokenizer)
    found = []
    for word, count in words.counts.items():
        bare = word.lstrip("Ġ▁")
        if count < MIN_COUNT or len(bare) < 4 or not bare.isalpha() or bare in known:
            continue
        length = len(backend.encode(bare, add_special_tokens=False).ids)
        if length >= 3:
            found.append((-count * (length - 1), bare))
    return [word for _, word in sorted(found)[:most]]


def pieces_per_word(words: Words, tokenizer: Any) -> float:
    """Mean number of pieces a word of the text is split into, weighted by how often it occurs."""
    names = [word.lstrip("Ġ▁") or word for word in words.counts]
    encodings = uncut(tokenizer).encode_batch(names, add_special_tokens=False)
    total = sum(count * len(e.ids) for count, e in zip(words.counts.values(), encodings, strict=True))
    return total / max(1, words.counts.total())
