"""Scored pairs out of labels: texts of one class belong together (1), of two classes apart (0); arXiv 2209.11055.

With a handful of texts a class, pairs are many where rows are few, and an encoder that is tuned on them first reads
the classes far better than one whose head alone has seen the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from embedtune import keyed
from embedtune.data.labels import Labelled
from embedtune.data.lines import Problem
from embedtune.data.read import Counts
from embedtune.errors import UserError

LIKE, UNLIKE = 11, 12  # what a key is for
REPEAT = Problem("a pair that was made before", "a pair that was made before", fix="")


def class_pairs(rows: Sequence[Labelled], rounds: int, seed: int, tally: Counts) -> Iterator[dict[str, Any]]:
    """`rounds` times each text beside another of its class, score 1, and one of another class, score 0.

    Pairs that were made before, either way round, are left out and counted in `tally`. Raises UserError for rows with
    several labels or a second text, and where there is one class only, or no class with two texts.
    """
    where = rows[0].file if rows else ""
    if any(row.multi or row.pair is not None for row in rows):
        raise UserError("pairs are made of rows with one text and one label each", where=where)
    names = sorted({row.labels[0] for row in rows})
    classes = np.array([names.index(row.labels[0]) for row in rows])
    members = [np.flatnonzero(classes == number) for number in range(len(names))]
    if len(names) < 2 or max(map(len, members)) < 2:
        raise UserError("needs two classes at least, one of them with two texts", where=where)
    made: set[tuple[str, str]] = set()
    for turn in range(rounds):
        for row, number in enumerate(classes.tolist()):
            own, others = members[number], np.flatnonzero(classes != number)
            for salt, pool, score in ((LIKE, own[own != row], 1.0), (UNLIKE, others, 0.0)):
                if not len(pool):
                    continue
                other = int(pool[int(keyed.uniform(keyed.key(seed, salt, turn, row))[0] * len(pool))])
                left, right = rows[row].text, rows[other].text
                pair = (min(left, right), max(left, right))
                tally.rows += 1
                if left == right or pair in made:
                    tally.note(tally.rejected, REPEAT, f"rows {rows[row].number} and {rows[other].number}")
                    continue
                made.add(pair)
                yield {"sentence1": left, "sentence2": right, "score": score}
