"""`refine length`: read the text, embed it, find the direction, add it to the model folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from embedtune.data.columns import parse_columns
from embedtune.data.read import BadRows, Counts, DataLike, read_texts
from embedtune.refine.length import LengthReport, fit_length, save_length

SAY_SECONDS = 10


@dataclass(frozen=True)
class Measured:
    """A length report, and how many texts and tokens it took in how many seconds of embedding."""

    report: LengthReport
    folder: Path
    texts: int
    tokens: int
    seconds: float
    remarks: list[str]

    def lines(self) -> list[str]:
        """The report in words."""
        rate = self.tokens / max(self.seconds, 1e-9)
        return [
            *self.report.lines(),
            f"{self.texts:,} texts, {self.tokens:,} tokens in {self.seconds / 60:.1f} minutes ({rate:,.0f} tokens/s)",
            *self.remarks,
            f"{self.folder}/ now holds length_direction.npy, length_direction.json, length.png, length.svg",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        outs = {"tokens": self.report.tokens, "log_tokens": self.report.log_tokens}
        read_outs = {
            k: {"r2_in_sample": v.r2_fit, "r2_held_out": v.r2, "interval": v.interval} for k, v in outs.items()
        }
        about = {"texts": self.texts, "token_count": self.tokens, "seconds": self.seconds, "remarks": self.remarks}
        return {"folder": str(self.folder), **read_outs, "space": self.report.space, **about}


def measure_length(
    model: str,
    data: DataLike,
    *,
    columns: str | None = None,
    bad_rows: BadRows = "fail",
    rows: int | None = None,
    precision: Any = "fp32",
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure the length direction of `model` on the texts of `data` (the first `rows`), and add it to its folder.

    Memory is flat in the size of the data. Raises UserError for a model or data that cannot be used.
    """
    from embedtune.encoder import embedder, load
    from embedtune.encoder.embed import Embedded, embed

    folder = load.find_own(model)
    counts = Counts()
    texts = (
        row.values["text"] for row in read_texts(data, columns=parse_columns(columns), bad_rows=bad_rows, counts=counts)
    )
    opened, padded = embedder.load_embedder(folder, precision)
    start = said = time.monotonic()
    seen = {"texts": 0, "tokens": 0}

    def watched() -> Iterator[Embedded]:
        nonlocal said
        for block in embed(opened, islice(texts, rows)):
            seen["texts"] += len(block.tokens)
            seen["tokens"] += int(block.tokens.sum())
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                note(f"{seen['texts']:,} texts, {seen['tokens'] / (said - start):,.0f} tokens/s")
            yield block

    report = fit_length(watched())
    seconds = time.monotonic() - start
    save_length(folder, report)
    remarks = [f"{n:,} rows left out: {reason}" for reason, n in counts.rejected.items() if reason != "blank"]
    remarks += [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]
    if padded:
        remarks.append(f"this architecture runs padded, sorted by length: {padded}")
    return Measured(report, folder, seen["texts"], seen["tokens"], seconds, remarks)
