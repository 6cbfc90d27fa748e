"""What was grown, as a file: rows to .jsonl, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedtune import files
from embedtune.data.read import Counts
from embedtune.errors import UserError


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], counts: Counts | None = None) -> int:
    """Write rows as one JSON object a line as they come, and return how many; the file appears when all are there.

    Raises UserError, with what `counts` has refused, where there is not one row.
    """
    number = 0
    with files.growing(path) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            number += 1
        if not number:
            refused = counts.rejected if counts is not None else {}
            details = [f"{n:,} x {reason}" for reason, n in refused.items()]
            raise UserError("nothing to write: not one row came out", where=str(path), details=details)
    return number
