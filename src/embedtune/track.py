"""Trackers: thin adapters on the log. What a tracker shows is what log.jsonl says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from embedtune.errors import UserError

FOLDER = "tensorboard"


def followed(listener: Any, track: str, home: Path) -> Any:
    """`listener`, with every record of the log written to a tracker too.

    TensorBoard's event files lie in `home`/tensorboard. They are made anew from the log when a run is resumed, so that
    no step stands there twice. Raises UserError where the tracker is not installed.
    """
    if track == "none":
        return listener
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "needs the package tensorboard", where="--track", fix="pip install 'embedtune[track]'"
        ) from error
    from embedtune.fit.engine import Listener, read_log

    shutil.rmtree(home / FOLDER, ignore_errors=True)
    writer = SummaryWriter(str(home / FOLDER), flush_secs=10)

    def show(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, float | int) and not isinstance(value, bool):
                kind = "dev" if name.startswith("dev_") else "train"
                writer.add_scalar(f"{kind}/{name.removeprefix('dev_')}", value, record["step"])
        writer.flush()

    for record in read_log(home):
        show(record)

    def step(record: dict[str, Any], total: int) -> None:
        show(record)
        listener.step(record, total)

    return Listener(listener.note, step)
