"""BM25 over the texts of an index, by the bm25s package."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.errors import UserError
from embedtune.search.postings import Postings, blocks

FIX = "pip install 'embedtune[search]'"
ENDING = ".csc.index.npy"  # of the arrays that bm25s saves


def is_there() -> bool:
    """Whether the package is installed."""
    import importlib.util

    return importlib.util.find_spec("bm25s") is not None


def build(folder: Path, texts: Iterable[str]) -> None:
    """Write the BM25 scores of all words in all texts to `folder`: the files, byte for byte, that bm25s saves.

    It computes and saves all at once; here that is done a part at a time, and only the words are held in memory.
    """
    import bm25s

    with files.disk_errors(folder), files.scratch(folder.parent) as scratch:
        found = Postings(scratch)
        for block in blocks(texts):
            found.add(block)
        if not found.words:
            return
        made, starts = bm25s.BM25(), np.cumsum([0, *found.often])
        nothing = dict.fromkeys(("data", "indices", "indptr"), np.zeros(0))
        made.scores, made.nonoccurrence_array = {**nothing, "num_docs": found.texts}, None
        made.vocab_dict = {**found.words, "": len(found.words)}  # as bm25s has it, for texts without a word
        made.save(folder, show_progress=False)
        files.write_array(folder / f"indptr{ENDING}", starts)
        _write_scores(folder, found, made.k1, made.b)
    files.flush(folder)


def _write_scores(folder: Path, found: Postings, k1: float, b: float) -> None:
    """The scores of all postings, and the numbers of their texts."""
    n, average = found.texts, found.length / found.texts
    idf = np.array([math.log(1 + (n - df + 0.5) / (df + 0.5)) for df in found.often.tolist()], np.float32)
    with files.growing(folder / f"data{ENDING}") as data, files.growing(folder / f"indices{ENDING}") as indices:
        for file, kind in ((data, "<f4"), (indices, "<i4")):
            about = {"descr": kind, "fortran_order": False, "shape": (int(found.often.sum()),)}
            np.lib.format.write_array_header_1_0(file, about)
        for part in found.parts():
            times = part["times"].astype(np.float32)
            frequency = times / (k1 * ((1 - b) + b * part["length"] / average) + times)
            data.write((idf[part["word"]] * frequency).astype("<f4").tobytes())
            indices.write(part["text"].astype("<i4").tobytes())


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
