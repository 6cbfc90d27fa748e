"""Bulk embedding as a stream: texts in, blocks of vectors out, memory flat in the number of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from embedtune.data.tokens import encode_cut
from embedtune.encoder import varlen
from embedtune.encoder.device import free_bytes, repeatable
from embedtune.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WINDOW = 2048  # texts that are sorted by length together


@dataclass(frozen=True, eq=False)
class Embedded:
    """Vectors of consecutive texts, in the texts' order."""

    vectors: np.ndarray  # (B, D) float32
    tokens: np.ndarray  # (B,) int64: the tokens the model saw, special ones included
    truncated: int = 0  # how many of these texts were longer than the model reads


class Rows(NamedTuple):
    """Texts as the model reads them: their token ids, and which were cut, (B,) bool."""

    ids: list[np.ndarray]
    cut: np.ndarray


def embed(
    model: SentenceTransformer,
    texts: Iterable[str],
    *,
    max_tokens: int | None = None,
    window: int = WINDOW,
    prompt: str | None = None,
) -> Iterator[Embedded]:
    """Embed a stream of texts as `model.encode` would, one `Embedded` per `window` texts.

    Inside a window texts are sorted by length and batched under a budget of `max_tokens` (`budget` of the device;
    padded tokens, or real ones where the model is padding-free); a text longer than the budget goes alone. The
    model's default prompt (or `prompt`, where it is not None) and `truncate_dim` are honoured. While the model
    computes, a thread makes tokens of the next window. Vectors are float32 whatever the model computes in. Raises
    UserError for an item that is not a text.
    """
    if prompt is None:
        prompt = model.prompts.get(model.default_prompt_name or "")
    if prompt:
        first: Any = model[0]
        first._get_prompt_length(prompt)  # kept by the model; later it would ask the tokenizer while a thread does
    with ThreadPoolExecutor(1) as ahead:
        tokenized = (ahead.submit(tokenize, model, block, prompt or "") for block in _windows(texts, window))
        now = next(tokenized, None)
        while now is not None:
            rows, now = now.result(), next(tokenized, None)
            yield embed_rows(model, rows, max_tokens, prompt or "")


def _windows(texts: Iterable[str], window: int) -> Iterator[list[str]]:
    stream, first = iter(texts), 0
    while block := list(islice(stream, window)):
        for row, text in enumerate(block, first):
            if not isinstance(text, str):
                raise UserError(f"a text was expected, found {type(text).__name__}", where=f"text {row:,}")
        yield block
        first += len(block)


def tokenize(model: SentenceTransformer, texts: list[str], prompt: str = "") -> Rows:
    """Token ids of each text, special ones and prompt included, cut to what the model reads."""
    tokenizer = model.tokenizer

    def encode(some: list[str]) -> Any:
        return tokenizer(
            some,
            truncation=model.max_seq_length is not None,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that a text is too long is counted and reported by us
        ).encodings

    most = model.max_seq_length if tokenizer.truncation_side == "right" else None
    found = encode_cut(encode, [prompt + text for text in texts], most)
    cut = np.array([bool(encoding.overflowing) for encoding in found], bool)
    return Rows([np.array(encoding.ids, np.int64) for encoding in found], cut)


def budget(device: torch.device) -> int:
    """Tokens of a forward pass: on a CPU few, whose activations stay in the caches; on a GPU enough to fill it.

    That is 65,536 where 8 GB are free, fewer where less is, and 8,192 at least.
    """
    return 2048 if device.type == "cpu" else min(65_536, max(8192, free_bytes(device) >> 17))


@torch.inference_mode()
def embed_rows(model: SentenceTransformer, rows: Rows, max_tokens: int | None, prompt: str = "") -> Embedded:
    """Embed rows of token ids whose first tokens are `prompt`; the vectors come to the CPU once, at the end."""
    first: Any = model[0]
    extra = {"prompt_length": first._get_prompt_length(prompt)} if prompt else {}
    sizes = np.array([len(ids) for ids in rows.ids], np.int64)
    order = np.argsort(-sizes, kind="stable")  # the longest first: if memory is short it shows at once
    vectors = []
    was_training = model.training
    model.eval()
    try:
        with repeatable(model.device):
            for part in batches(sizes[order], max_tokens or budget(model.device), padded=not _padding_free(model)):
                features = _collate(model, [rows.ids[i] for i in order[part]])
                vectors.append(model({**features, **extra})["sentence_embedding"])
    finally:
        model.train(was_training)
    stacked = torch.cat(vectors)[:, : model.truncate_dim].float().cpu().numpy()
    return Embedded(np.ascontiguousarray(stacked[np.argsort(order)]), sizes, int(rows.cut.sum()))


def _collate(model: SentenceTransformer, ids: list[np.ndarray]) -> dict[str, Any]:
    """What `model.preprocess` gives for these rows: laid end to end, or padded where the architecture needs it."""
    first: Any = model[0]
    if _padding_free(model):
        return varlen.pack(ids, first._flatten_position_offset or 0, model.device)
    return varlen.pad(ids, model.tokenizer.pad_token_id or 0, model.device)


def batches(sizes: np.ndarray, max_tokens: int, *, padded: bool) -> Iterator[slice]:
    """Cut texts of descending `sizes` (tokens) into runs whose cost stays under `max_tokens`.

    The cost of a run is rows x longest where it is padded, the sum of its sizes where it is not.
    """
    start, cost = 0, 0
    for i, size in enumerate(sizes.tolist()):
        cost = (i - start + 1) * int(sizes[start]) if padded else cost + size
        if cost > max_tokens and i > start:
            yield slice(start, i)
            start, cost = i, size
    if len(sizes):
        yield slice(start, len(sizes))


def _padding_free(model: SentenceTransformer) -> bool:
    return bool(getattr(model[0], "can_flatten_inputs", False))
