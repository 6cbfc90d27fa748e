"""What every preparation hands to the story of a run (tune.py): an objective ready to train, and all about it."""

from __future__ import annotations

import hashlib
import math
import platform
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from embedtune.data.formats import BLANK
from embedtune.data.read import Counts
from embedtune.data.tokens import Tokens, open_tokens, uncut
from embedtune.encoder.device import pick_device
from embedtune.fit import ranks
from embedtune.fit.past import weights_sha256

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """An objective that is ready to train, and all that the story of the run needs."""

    objective: Any
    recipe: Any  # with its own fields resolved
    name: str
    max_length: int
    profile: dict[str, Any]
    identity: dict[str, str]
    remarks: list[str]
    lr: float  # where the recipe names none
    measure: str  # where the recipe names none
    base: Path  # the folder of the model that training starts from
    dev: Any = None  # what the objective is scored on, where it does not know that itself
    old: int | None = None  # of what is scored on, so many (the first) are of the run that this one goes on from
    texts: tuple[str, ...] = ()  # of objectives that learn vectors: each text, by its token row


def tokenised(
    tokenize: Callable[..., Tokens], rows: Iterable[Any], tokenizer: Any, max_length: int, folder: Path, **how: bool
) -> Tokens:
    """Token rows that the first process writes into `folder` by `tokenize` (data/tokens.py); the others map them."""
    return written(lambda: tokenize(rows, tokenizer, max_length, folder, **how), rows, lambda: open_tokens(folder))


def written(make: Callable[[], T], rows: Iterable[Any], opened: Callable[[], T]) -> T:
    """What the first process makes of `rows` by `make`; the others open it once it is there.

    They too read the rows, which are counted on the way.
    """

    def work() -> T | None:
        if ranks.world()[0] == 0:
            return make()
        deque(rows, maxlen=0)
        return None

    made = ranks.together(work)
    return opened() if made is None else made


def name_of(data: Any) -> str:
    """Data in words: its path, or how many rows were given in Python."""
    return str(data) if isinstance(data, str | Path) else f"{len(data):,} rows given in Python"


def rows_lost(counts: Counts) -> list[str]:
    """What the reader left out, mended, ignored or noted, a line each."""
    out = list(counts.notes)
    out += [
        f"{n:,} rows left out: {reason} ({', '.join(counts.examples.get(reason, []))})"
        for reason, n in left_out(counts).items()
    ]
    out += [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]
    if counts.ignored:
        out.append(f"{len(counts.ignored):,} files of other kinds ignored")
    return out


def left_out(counts: Counts) -> dict[str, int]:
    """Rows that were rejected; blank lines separate documents and are no loss."""
    return {reason: n for reason, n in counts.rejected.items() if reason != BLANK.reason}


def in_words(tally: dict[str, int]) -> str | None:
    """'3 blank, 2 not UTF-8', or None for an empty tally."""
    return ", ".join(f"{n:,} {reason}" for reason, n in tally.items()) or None


def data_profile(train: Any, counts: Counts, dev_counts: Counts | None) -> dict[str, Any]:
    """The part of a data profile that all tasks share."""
    return {
        "name": Path(name_of(train)).name,
        "files": len(counts.files),
        "bytes": counts.bytes,
        "sha256": counts.sha256,
        "lines": counts.rows,
        "lines_used": counts.used,
        "blank_lines": counts.rejected.get(BLANK.reason),
        "left_out": in_words(left_out(counts)),
        "mended": in_words(counts.replaced),
        "dev_sha256": dev_counts.sha256 if dev_counts else None,
    }


def token_profile(spread: np.ndarray) -> dict[str, Any]:
    """How many tokens there are, and how they spread over the rows: `spread[n]` rows have n tokens."""
    return {
        "tokens": int(spread @ np.arange(len(spread))),
        "tokens_per_row_median": _quantile(spread, 0.5),
        "tokens_per_row_p95": _quantile(spread, 0.95),
    }


def _quantile(spread: np.ndarray, share: float) -> float:
    """np.quantile of lengths of which `spread[n]` are n."""
    upto = np.cumsum(spread)
    place = share * (upto[-1] - 1)
    low, high = np.searchsorted(upto, [math.floor(place), math.ceil(place)], side="right").tolist()
    return float(np.quantile([low, high], place - math.floor(place)))


def identity(folder: Path, tokenizer: Any, counts: Counts, dev_counts: Counts | None) -> dict[str, str]:
    """What must be the same when a run is resumed."""
    import transformers

    return {
        "training data": counts.sha256,
        "dev data": dev_counts.sha256 if dev_counts else "held out",
        "model weights": weights_sha256(folder),
        # Without its cutting and padding, which a call changes, and the first process alone may have called it.
        "tokenizer": hashlib.sha256(uncut(tokenizer).to_str().encode()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processes": str(ranks.world()[1]),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "device": str(pick_device()),
    }
