"""The tokens of a model: which continue a word, and new ones, each starting as the mean of its old pieces."""

from __future__ import annotations

import json

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

from embedtune.encoder.load import Loaded


def continuations(pieces: list[str]) -> np.ndarray:
    """(V,) bool: which tokens continue a word, for WordPiece (##), byte-level BPE (no Ġ) and SentencePiece (no ▁).

    A vocabulary that marks nothing has whole words only.
    """
    if any(piece.startswith("##") for piece in pieces):
        return np.array([piece.startswith("##") for piece in pieces])
    for mark in ("Ġ", "▁"):
        if sum(piece.startswith(mark) for piece in pieces) > len(pieces) // 10:
            return np.array([not piece.startswith(mark) for piece in pieces])
    return np.zeros(len(pieces), bool)


@torch.no_grad()
def add_words(loaded: Loaded, words: list[str]) -> int:
    """Give `loaded` a token for each word not in its vocabulary yet, in place; returns how many.

    A WordPiece vocabulary gets true entries, so the longest match finds them; others get added tokens that match
    whole words. Embedding rows (and the head's bias) start as the mean of the word's old pieces.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    known = tokenizer.get_vocab()
    words = [word for word in dict.fromkeys(words) if word not in known]
    old = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    _extend_tokenizer(tokenizer, words)
    size = len(tokenizer)
    model.resize_token_embeddings(max(size, model.get_input_embeddings().weight.shape[0]), mean_resizing=False)
    weight = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    bias = None if head is None else head.bias
    for word, pieces in zip(words, old, strict=True):
        row = tokenizer.convert_tokens_to_ids(word)
        weight[row] = weight[pieces].mean(0)
        if bias is not None:
            bias[row] = bias[pieces].mean()
    return len(words)


def _extend_tokenizer(tokenizer: object, words: list[str]) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    if state["model"].get("type") != "WordPiece":
        tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=True) for w in words])  # type: ignore[attr-defined]
        return
    vocabulary = state["model"]["vocab"]
    first = max([*vocabulary.values(), *(token["id"] for token in state["added_tokens"])]) + 1
    vocabulary.update({word: first + number for number, word in enumerate(words)})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # type: ignore[attr-defined]
