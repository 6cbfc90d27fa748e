"""The order of documents whose scores are equal: descending by id, as in trec_eval, however many ids there are."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from itertools import islice
from typing import IO

import numpy as np

from embedtune import files

RUN = 1 << 16  # ids that are sorted at once


def descending(ids: Iterable[str], count: int) -> np.ndarray:
    """The place (from 0) of each of `count` distinct ids in descending order of their code points: (count,) int32.

    An external merge sort: runs of RUN ids are sorted and, where there are several, lie in files without names while
    they are merged. Raises UserError where the disk is full.
    """
    numbered = zip(ids, range(count))
    runs: list[Iterable[tuple[str, int]]] = []
    while run := sorted(islice(numbered, RUN)):
        runs.append(run if len(run) == count else map(json.loads, _written(run)))
    out = np.empty(count, np.int32)
    for place, (_, number) in enumerate(heapq.merge(*runs), 1):
        out[number] = count - place
    return out


def _written(run: Iterable[tuple[str, int]]) -> IO[bytes]:
    """A scratch file with a line for each, to be read from its beginning."""
    file = files.scratch()
    with files.disk_errors(files.scratch_folder()):
        file.writelines(f"{json.dumps(each)}\n".encode() for each in run)
        file.seek(0)
    return file
