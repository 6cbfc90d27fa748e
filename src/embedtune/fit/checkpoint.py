"""Checkpoints: a directory each, valid exactly if its manifest verifies; safetensors and JSON only.

`step-0000500` holds the masters, the moments and the loop's counters; `best-0000400` holds the weights of the best
scoring so far. The order of durability is: new directory complete on the disk, then old ones are removed.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from embedtune import files, schema
from embedtune.errors import UserError, short_list

KEEP = 2


@dataclass
class State:
    """The loop's counters: all that a resumed run needs beside weights and moments."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    scored: int = -1  # the step last scored
    skipped: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    log_tokens: int = 0
    max_tokens: int = 0
    events: list[str] = field(default_factory=list)


def knows(state: State, record: dict[str, Any]) -> bool:
    """Whether a record of log.jsonl was written before a checkpoint with these counters.

    Its last step may be logged and scored after it: at the end, where neither was due before.
    """
    if record["step"] != state.step or "left_out" in record:
        return bool(record["step"] <= state.step)
    return state.loss_steps == 0 if "loss" in record else state.scored == state.step


def save(folder: Path, state: State, tensors: dict[str, Tensor]) -> Path:
    """Write checkpoint `state.step` into `folder`, then remove what is no longer needed.

    Raises UserError where weights or moments are not finite: the checkpoint before is then the one to go on from.
    """
    path = folder / f"step-{state.step:07d}"
    values = dataclasses.asdict(state)
    _check_finite(tensors, path)

    def fill(place: Path) -> None:
        files.write_tensors(place / "state.safetensors", {k: v.contiguous().cpu() for k, v in tensors.items()}, {})
        files.write_json(place / "state.json", values)

    files.write_directory(path, fill, {"step": state.step})
    _prune(folder)
    return path


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """A weight that no row of a batch reads shows in no loss and no gradient, but it is not written."""
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(
            f"training diverged: {len(broken):,} of {len(tensors):,} tensors are not finite ({short_list(broken)})",
            where=str(path),
            fix="--resume goes on from the checkpoint before; if it comes again, a smaller --lr or --precision fp32",
        )


def save_best(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write the weights of the best scoring so far; older ones go when no checkpoint names them any more."""
    _check_finite(tensors, folder / f"best-{step:07d}")

    def fill(place: Path) -> None:
        files.write_tensors(place / "weights.safetensors", {k: v.contiguous().cpu() for k, v in tensors.items()}, {})

    files.write_directory(folder / f"best-{step:07d}", fill, {"step": step})


def _prune(folder: Path) -> None:
    """Keep the newest checkpoints, and the best weights that one of them names."""
    steps = _numbered(folder, "step")
    for path in steps[:-KEEP]:
        shutil.rmtree(path, ignore_errors=True)
    named = []
    for path in steps[-KEEP:]:
        with suppress(UserError):  # damaged after it was written: `newest` will pass it over
            named.append(_counters(path).best_step)
    newest = max((step for step in named if step is not None), default=-1)
    for path in _numbered(folder, "best"):
        if _number(path) not in named and _number(path) < newest:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*" + files.TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)


def _numbered(folder: Path, kind: str) -> list[Path]:
    """The folders step-N or best-N, by their numbers: these have seven digits, or more."""
    found = [path for path in folder.glob(f"{kind}-*") if path.name.removeprefix(f"{kind}-").isdecimal()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    """The step that a folder is named after."""
    return int(path.name.rpartition("-")[2])


def _counters(path: Path) -> State:
    """The counters of a checkpoint; a UserError where they are none, or those of another step."""
    found = files.read_json(path / "state.json")
    try:
        state = State(**found)
    except TypeError as error:
        raise UserError(f"state.json is not of this version: {error}", where=str(path)) from error
    for name, kind in get_type_hints(State).items():
        value = getattr(state, name)
        if not schema.fits(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"state.json has something other than {kind} as {name}", where=str(path))
    if state.step != _number(path):
        raise UserError(f"state.json is of step {state.step:,}", where=str(path))
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; a UserError where it is none, although its sum is right."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", where=str(path.parent)) from error


def newest(folder: Path) -> tuple[State, dict[str, Tensor], list[str]] | None:
    """The newest valid checkpoint as (state, tensors, remarks on broken newer ones); None where there is none.

    Raises UserError where there are checkpoints but all are broken.
    """
    remarks: list[str] = []
    for path in reversed(_numbered(folder, "step")):
        reason = files.damage(path, {"step": _number(path)})
        if reason is None:
            try:
                state = _counters(path)
                if state.best_step is None or not (reason := _damage_of_best(folder, state.best_step)):
                    return state, _tensors(path / "state.safetensors"), remarks
            except UserError as error:  # the sums are right, but it was not written by this version
                reason = error.what
        remarks.append(f"checkpoint {path.name} is damaged and was passed over: {reason}")
    if remarks:
        raise UserError("no checkpoint is intact", where=str(folder), details=remarks, fix="start anew with --discard")
    return None


def _damage_of_best(folder: Path, step: int) -> str | None:
    reason = files.damage(folder / f"best-{step:07d}", {"step": step})
    return reason and f"its best weights are damaged: {reason}"


def load_best(folder: Path, step: int) -> dict[str, Tensor]:
    """The best weights; a UserError where they are damaged, never a silent fall back to the last ones."""
    path = folder / f"best-{step:07d}"
    if reason := files.damage(path, {"step": step}):
        raise UserError(f"the best weights cannot be restored: {reason}", where=str(path), fix="--resume runs it again")
    return _tensors(path / "weights.safetensors")
