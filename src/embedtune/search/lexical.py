"""BM25 over the texts of an index, by the bm25s package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.errors import UserError

FIX = "pip install 'embedtune[search]'"


def is_there() -> bool:
    """Whether the package is installed."""
    import importlib.util

    return importlib.util.find_spec("bm25s") is not None


def build(folder: Path, texts: Iterable[str]) -> None:
    """Write the BM25 scores of all words in all texts to `folder`; texts and their words are held in memory."""
    import bm25s

    words = bm25s.tokenize(list(texts), stopwords=None, show_progress=False)
    if not words.vocab:
        return
    scores = bm25s.BM25()
    scores.index(words, show_progress=False)
    scores.save(folder, show_progress=False)
    files.flush(folder)


def load(folder: Path) -> Any:
    """What `build` wrote, mapped into memory."""
    import bm25s

    try:
        return bm25s.BM25.load(folder, mmap=True, show_progress=False)
    except Exception as error:  # noqa: BLE001 - of files whose sums are right; the package raises many kinds
        fix = "embedtune search compact, or build the index anew"
        raise UserError("cannot be read as a table of words", where=str(folder), fix=fix) from error


def scores(found: Any, query: str) -> np.ndarray:
    """The BM25 score of every text for the query: (N,) float32; 0 where no word of it is in the text."""
    import bm25s

    (words,) = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)
    known = [word for word in words if word in found.vocab_dict]
    if not known:
        return np.zeros(found.scores["num_docs"], np.float32)
    result: np.ndarray = found.get_scores(known)
    return result
