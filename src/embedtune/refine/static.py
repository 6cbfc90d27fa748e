"""A model as a table of tokens: each token's vector by the whole model, PCA, weights of smooth inverse frequency.

As model2vec distils: a token is encoded alone, between the special tokens, through pooling and whatever stands after
it (an erased concept's Dense too). A text is then the mean of its tokens' rows: no attention, no order, and thousands
of texts a second. The folder has model2vec's layout, which sentence-transformers opens as StaticEmbedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from embedtune import files
from embedtune.encoder.exported import TABLE
from embedtune.errors import UserError
from embedtune.refine.graph import OUTPUT, ends_normalised

DIMS = 256
ROWS = 1024  # tokens encoded at once
# a / (a + p): 1e-3 goes with frequencies that were counted, 1e-4 with Zipf's law over the ids, as in model2vec.
COUNTED, ZIPF = 1e-3, 1e-4


def token_vectors(model: Any, tokenizer: Tokenizer) -> np.ndarray:
    """The vector of every token (V, d) float64, before a last Normalize; zero for special and unknown tokens.

    Zero rows are tokens that model2vec leaves out of a mean and sentence-transformers does not: so both agree.
    """
    encoding = tokenizer.encode("a")
    special = np.array(encoding.special_tokens_mask, bool)
    text = np.flatnonzero(~special)
    before, after = encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
    count = tokenizer.get_vocab_size()
    stages = list(model)[:-1] if ends_normalised(model) else list(model)
    found = []
    with torch.inference_mode():
        for start in range(0, count, ROWS):
            ids = torch.tensor([[*before, token, *after] for token in range(start, min(start + ROWS, count))])
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for stage in stages:
                features = stage(features)
            found.append(features[OUTPUT].double().numpy())
    vectors = np.concatenate(found)
    vectors[list({*model.tokenizer.all_special_ids})] = 0
    return vectors


def frequencies(tokenizer: Tokenizer, blocks: Iterable[list[str]]) -> np.ndarray | None:
    """The share of each token (V,) in blocks of texts; None where there is none."""
    counts = np.zeros(tokenizer.get_vocab_size())
    for block in blocks:
        for encoding in tokenizer.encode_batch(block, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
    return counts / counts.sum() if counts.any() else None


def table(vectors: np.ndarray, shares: np.ndarray | None, dims: int | None) -> tuple[np.ndarray, float]:
    """The rows (V, dims) float32 and the coefficient of their weights.

    Principal components of the tokens, counted as often as they occur (each once where `shares` is None), then each
    row times a / (a + p). Raises UserError where so many components do not exist.
    """
    real = np.asarray(vectors.any(axis=1))
    most = min(vectors.shape[1], int(real.sum()) - 1)
    if not 1 <= (dims := min(DIMS, most) if dims is None else dims) <= most:
        raise UserError(f"{dims:,} dimensions cannot be kept: 1 to {most:,} are possible", where="--dims")
    weight = real / real.sum() if shares is None or not (shares * real).any() else shares * real
    centred = (vectors - np.average(vectors, axis=0, weights=weight)) * real[:, None]
    components = np.linalg.eigh((centred * weight[:, None]).T @ centred)[1][:, ::-1][:, :dims]
    a = ZIPF if shares is None else COUNTED
    rank = 1 / np.arange(2, len(vectors) + 2)
    p = rank / rank.sum() if shares is None else shares
    return (centred @ components * (a / (a + p))[:, None]).astype(np.float32), a


def write_static(rows: np.ndarray, coefficient: float, name: str, folder: Path) -> None:
    """Write weights and settings in the layout that model2vec and sentence-transformers share."""
    files.write_tensors(folder / TABLE, {"embeddings": torch.from_numpy(rows)}, {"format": "pt"})
    files.write_json(folder / "config.json", {
        "model_type": "model2vec", "architectures": ["StaticModel"], "tokenizer_name": name,
        "apply_pca": rows.shape[1], "sif_coefficient": coefficient, "hidden_dim": rows.shape[1],
        "seq_length": 1_000_000, "normalize": True, "embedding_dtype": "float32",
    })  # fmt: skip
    kinds = {".": "StaticEmbedding", "1_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    files.write_json(folder / "modules.json", modules)
