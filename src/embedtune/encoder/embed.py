"""Bulk embedding as a stream: texts in, blocks of vectors out, memory flat in the number of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from embedtune.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Vectors of consecutive texts, in the texts' order."""

    vectors: np.ndarray  # (B, D) float32
    tokens: np.ndarray  # (B,) int64: the tokens the model saw, special ones included
    truncated: int = 0  # how many of these texts were longer than the model reads


def embed(
    model: SentenceTransformer,
    texts: Iterable[str],
    *,
    max_tokens: int = 8192,
    window: int = 2048,
    precision: Precision = "fp32",
    prompt: str | None = None,
) -> Iterator[Embedded]:
    """Embed a stream of texts as `model.encode` would, one `Embedded` per `window` texts.

    Inside a window texts are sorted by length and batched under a budget of `max_tokens` (padded tokens, or
    real ones where the model is padding-free); a text longer than the budget goes alone. The model's default
    prompt (or `prompt`, where it is not None) and `truncate_dim` are honoured. "bf16" runs the forward pass under
    autocast; vectors stay float32. Raises UserError for an item that is not a text.
    """
    stream, first = iter(texts), 0
    if prompt is None:
        prompt = model.prompts.get(model.default_prompt_name or "")
    while block := list(islice(stream, window)):
        for row, text in enumerate(block, first):
            if not isinstance(text, str):
                raise UserError(f"a text was expected, found {type(text).__name__}", where=f"text {row:,}")
        yield _embed_window(model, block, max_tokens, precision, prompt or None)
        first += len(block)


@torch.inference_mode()
def _embed_window(
    model: SentenceTransformer, texts: list[str], max_tokens: int, precision: Precision, prompt: str | None
) -> Embedded:
    """Embed the texts of one window; the vectors come to the CPU once, at its end."""
    lengths = _lengths(model, texts, prompt)
    limit = model.max_seq_length
    order = np.argsort(-lengths, kind="stable")  # the longest first: if memory is short it shows at once
    sizes = lengths if limit is None else np.minimum(lengths, limit)
    vectors, tokens = [], []
    was_training = model.training
    model.eval()
    try:
        for rows in batches(sizes[order], max_tokens, padded=not _padding_free(model)):
            features = model.preprocess([texts[i] for i in order[rows]], prompt=prompt)
            tokens.append(_tokens(features))
            features = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in features.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                vectors.append(model(features)["sentence_embedding"])
    finally:
        model.train(was_training)
    place = np.argsort(order)
    seen = np.concatenate(tokens)[place]
    stacked = torch.cat(vectors)[:, : model.truncate_dim].float().cpu().numpy()
    return Embedded(np.ascontiguousarray(stacked[place]), seen, int((lengths > seen).sum()))


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


def _lengths(model: SentenceTransformer, texts: list[str], prompt: str | None) -> np.ndarray:
    """Tokens of each text before truncation, special ones and prompt included: (B,) int64."""
    full = [prompt + text for text in texts] if prompt else texts
    ids = model.tokenizer(
        full,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # that a text is too long is counted and reported by us
    )["input_ids"]
    return np.fromiter(map(len, ids), np.int64, len(ids))


def _tokens(features: dict) -> np.ndarray:
    """Real tokens per text of a padded or a flattened batch: (B,) int64."""
    if "cu_seq_lens_q" in features:
        return features["cu_seq_lens_q"].diff().cpu().numpy().astype(np.int64)
    return features["attention_mask"].sum(dim=1).cpu().numpy().astype(np.int64)
