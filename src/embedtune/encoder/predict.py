"""Predictions as a stream: texts in; labels, scores or entities out, memory flat in the number of texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from embedtune.data.tags import spans
from embedtune.data.tokens import encode_cut, uncut
from embedtune.data.words import word_rows
from embedtune.encoder import heads
from embedtune.encoder.embed import batches
from embedtune.encoder.load import Loaded

WINDOW = 512  # texts that are sorted by length together
MAX_TOKENS = 8192  # a forward pass
THRESHOLD = 0.5  # where several labels may apply
# Words as tagged data has them: letters, digits and what joins them inside of a word, or a mark alone.
WORD = re.compile(r"\w+(?:[-'’.@]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Given:
    """A text, or a pair of texts, or a sentence that is in words already."""

    text: str
    pair: str | None = None
    words: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Predicted:
    """What a model says of one text, as plain values; `cut` where it read only the beginning."""

    values: dict[str, Any]
    cut: bool = False


def predict(loaded: Loaded, kind: str, given: Iterable[Given], *, top: int = 1) -> Iterator[Predicted]:
    """Predictions in the order of the texts.

    A classifier gives `label` and `score` (its probability), the `top` first ones as `labels` and `scores` where more
    are asked for; several labels that may apply: all from a probability of 0.5. A regressor gives `score`. A tagger
    gives `entities`: type, text, start and end in characters (end exclusive), first word and score, the mean
    probability of its words' tags.
    """
    loaded.model.eval()
    stream = iter(given)
    while some := list(islice(stream, WINDOW)):
        yield from (_tagged(loaded, some) if kind == heads.TOKEN else _rows(loaded, some, top))


def _rows(loaded: Loaded, given: Sequence[Given], top: int) -> Iterator[Predicted]:
    for logits, cut in row_outputs(loaded, given):
        yield Predicted(_said(loaded.model.config, logits, top), cut)


def row_outputs(loaded: Loaded, given: Sequence[Given]) -> Iterator[tuple[np.ndarray, bool]]:
    """For each text its logits (C,) float64, and whether it was cut."""
    backend = uncut(loaded.tokenizer)
    backend.enable_truncation(loaded.max_length)
    texts = [g.text if g.pair is None else (g.text, g.pair) for g in given]
    encoded = encode_cut(backend.encode_batch, texts, loaded.max_length)
    rows = [np.array(encoding.ids, np.int64) for encoding in encoded]
    types = None
    if heads.tells_texts_apart(loaded) and any(g.pair is not None for g in given):
        types = [np.array(encoding.type_ids, np.int64) for encoding in encoded]

    def run(some: list[int]) -> list[np.ndarray]:
        part = None if types is None else [types[i] for i in some]
        return list(heads.row_logits(loaded, [rows[i] for i in some], part).float().cpu().numpy())

    for encoding, logits in zip(encoded, _in_order(loaded, rows, run), strict=True):
        yield logits.astype(np.float64), bool(encoding.overflowing)


def chances_of(config: Any, logits: np.ndarray) -> np.ndarray:
    """Probabilities of the classes from logits (..., C): together 1, or each on its own where several may apply."""
    if config.problem_type == "multi_label_classification":
        return expit(logits)
    found: np.ndarray = softmax(logits, axis=-1)
    return found


def is_regressor(config: Any) -> bool:
    """Whether a head of rows gives a score rather than classes."""
    return config.problem_type == "regression" or config.num_labels == 1


def _said(config: Any, logits: np.ndarray, top: int) -> dict[str, Any]:
    names = [config.id2label[number] for number in range(len(logits))]
    if is_regressor(config):
        return {"score": float(logits[0])}
    chances = chances_of(config, logits)
    order = np.argsort(-chances, kind="stable")
    if config.problem_type == "multi_label_classification":
        order = order[chances[order] >= THRESHOLD]
    elif top == 1:
        return {"label": names[order[0]], "score": float(chances[order[0]])}
    else:
        order = order[:top]
    return {"labels": [names[i] for i in order], "scores": [float(chances[i]) for i in order]}


def _tagged(loaded: Loaded, given: Sequence[Given]) -> Iterator[Predicted]:
    places = [_words(g) for g in given]
    found = word_logits(loaded, [[text[a:b] for a, b in at] for text, at in places])
    for (text, at), logits in zip(places, found, strict=True):
        yield Predicted({"entities": list(_entities(loaded.model.config.id2label, text, at, logits))})


def word_logits(loaded: Loaded, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each sentence the logits of its words: (words, C) float64."""
    found = word_rows(sentences, loaded.tokenizer, loaded.max_length)

    def run(some: list[int]) -> list[np.ndarray]:
        rows = [found.rows[i] for i in some]
        starts = np.cumsum([len(row) for row in rows]) - [len(row) for row in rows]
        wanted = np.concatenate([found.first[i] + start for i, start in zip(some, starts)]).astype(np.int64)
        if not len(wanted):
            return [np.zeros((0, loaded.model.config.num_labels)) for _ in some]
        logits = heads.token_logits(loaded, rows, wanted).float().cpu().numpy()
        return np.split(logits, np.cumsum([len(found.first[i]) for i in some])[:-1])

    parts: list[list[np.ndarray]] = [[] for _ in sentences]
    for owner, logits in zip(found.sentence.tolist(), _in_order(loaded, found.rows, run), strict=True):
        parts[owner].append(logits)
    return [np.concatenate(part).astype(np.float64) for part in parts]


def _words(given: Given) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where its words stand in it: its own, or those that a regular expression finds."""
    if given.words is None:
        return given.text, [match.span() for match in WORD.finditer(given.text)]
    ends = np.cumsum([len(word) + 1 for word in given.words]) - 1
    return " ".join(given.words), [(int(end) - len(word), int(end)) for word, end in zip(given.words, ends)]


def _entities(
    names: dict[int, str], text: str, at: list[tuple[int, int]], logits: np.ndarray
) -> Iterator[dict[str, Any]]:
    if not len(at):
        return
    chances = softmax(logits, axis=1)
    best = chances.argmax(1)
    for kind, first, end in spans([names[int(number)] for number in best]):
        start, stop = at[first][0], at[end - 1][1]
        score = float(chances[np.arange(first, end), best[first:end]].mean())
        yield {"type": kind, "text": text[start:stop], "start": start, "end": stop, "word": first, "score": score}


@torch.inference_mode()
def _in_order(loaded: Loaded, rows: Sequence[np.ndarray], run: Any) -> list[np.ndarray]:
    """What `run` gives for each row, run on rows of like length, the longest first."""
    lengths = np.array([len(row) for row in rows])
    order, found = np.argsort(-lengths, kind="stable"), []
    for part in batches(lengths[order], MAX_TOKENS, padded=loaded.padded is not None):
        found += run(order[part].tolist())
    return [found[place] for place in np.argsort(order)]
