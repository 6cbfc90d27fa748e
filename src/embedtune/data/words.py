"""Tagged sentences to token rows: the first piece of each word carries its tag, and no word is lost.

A sentence that is longer than a row is chunked between words. A word of which the tokenizer keeps nothing stands as
its unknown token; one of more pieces than a row has room for keeps its first ones. All of it is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.data.tokens import affixes, uncut

SENTENCES = 512  # tokenised at once


@dataclass(frozen=True)
class WordRows:
    """Token rows of sentences, and where in each row its words begin.

    `rows` token ids with special tokens; `first` (words of the row,) places of first pieces in the row; `sentence`
    (rows,) which sentence a row is of, its rows in order.
    """

    rows: list[np.ndarray]
    first: list[np.ndarray]
    sentence: np.ndarray
    chunked: int  # sentences that did not fit in one row
    unknown: int  # words that the tokenizer keeps nothing of
    cut: int  # words of more pieces than a row has room for


def word_rows(sentences: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> WordRows:
    """Rows of at most `max_length` tokens, special ones included, for sentences given as words."""
    backend = uncut(tokenizer)
    before, after = affixes(tokenizer)
    room = max_length - len(before) - len(after)
    spaced = _needs_space(tokenizer)
    rows: list[np.ndarray] = []
    first: list[np.ndarray] = []
    owner: list[int] = []
    chunked = unknown = cut = 0
    for start in range(0, len(sentences), SENTENCES):
        some = sentences[start : start + SENTENCES]
        given = [[" " + word if spaced and place else word for place, word in enumerate(words)] for words in some]
        encoded = backend.encode_batch(given, is_pretokenized=True, add_special_tokens=False)
        for number, (words, encoding) in enumerate(zip(some, encoded, strict=True), start):
            pieces = _pieces(encoding, len(words))
            unknown += sum(not piece for piece in pieces)
            cut += sum(len(piece) > room for piece in pieces)
            pieces = [piece[:room] or [tokenizer.unk_token_id] for piece in pieces]
            chunks = _chunks([len(piece) for piece in pieces], room)
            chunked += len(chunks) > 1
            for a, b in chunks:
                lengths = np.array([len(piece) for piece in pieces[a:b]])
                rows.append(np.array([*before, *(i for piece in pieces[a:b] for i in piece), *after], np.int64))
                first.append(np.cumsum(lengths) - lengths + len(before))
                owner.append(number)
    return WordRows(rows, first, np.array(owner, np.int64), chunked, unknown, cut)


def _pieces(encoding: Any, count: int) -> list[list[int]]:
    """Token ids of each word."""
    pieces: list[list[int]] = [[] for _ in range(count)]
    for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
        if word is not None:
            pieces[word].append(piece)
    return pieces


def _chunks(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Ranges of words whose pieces fit into `room`, about equally long; [(0, 0)] of an empty sentence."""
    total = sum(lengths)
    fewest = max(1, -(-total // room))
    aim = -(-total // fewest)
    chunks, first, held = [], 0, 0
    for place, length in enumerate(lengths):
        if place > first and (held + length > room or held >= aim):
            chunks.append((first, place))
            first, held = place, 0
        held += length
    return [*chunks, (first, len(lengths))]


def _needs_space(tokenizer: Any) -> bool:
    """Whether words within a sentence are other tokens than at its start (byte-level BPE without add_prefix_space)."""
    alone, inside = (tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens for text in ("a", " a"))
    return inside[0].startswith("Ġ") and not alone[0].startswith("Ġ")
