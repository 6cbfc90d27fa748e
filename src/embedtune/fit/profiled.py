"""Where a training's time goes: some of its steps under torch's profiler, and how near they come to the ceiling."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from embedtune.fit import ceiling
from embedtune.fit.derive import config_of, widths

T = TypeVar("T")
WARM, STEPS = 5, 20  # steps that are left to themselves, and that are watched
STEP, APART = "embedtune: step", "embedtune: apart"
PRODUCTS, OTHER, PYTHON, BETWEEN = "matrix products", "other arithmetic", "data and Python", "log, checkpoints"
# Words in the name of what an operation is part of, or in its own name. The first that fits has it: what an
# operation is inside of comes before what it is.
INSIDE = {
    "attention": ("BlockAttention", "scaled_dot_product", "varlen_attn"),
    "optimizer": ("Optimizer.step",),
    "loss": ("CrossEntropy", "cross_entropy", "log_softmax"),
}
OWN = {
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "_linear_pointwise"),
    "optimizer": ("aten::_foreach", "aten::_fused_adamw", "linalg_vector_norm"),
    "norms and activations": ("layer_norm", "gelu", "relu", "tanh", "aten::silu"),
    "casts and copies": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat"),
    "embeddings, gathering": ("embedding", "index", "gather", "scatter", "masked_"),
}


class Blind:
    """Watches nothing."""

    def apart(self, work: T) -> T:
        """`work`."""
        return work

    def end(self) -> None:
        """Nothing."""


class Watch:
    """Watches an objective's steps; `note` gets the profile line by line when enough were seen, or at `end`.

    Each step is watched by itself, from its beginning to that of the next, as torch's profiler keeps alive what a step
    allocates. What goes through `apart` (scoring, drawing) is not counted. Nothing that is computed changes.
    """

    def __init__(self, objective: Any, precision: str, note: Callable[[str], None]) -> None:
        self.objective, self.precision, self.note = objective, precision, note
        self.device = next(objective.model.parameters()).device
        self.steps = self.seen = self.tokens = 0
        self.seconds = self.flops = self.away = self.start = 0.0
        self.parts: Counter[str] = Counter()
        self._profiler: Any = None
        self._inner = objective.step
        objective.step = self._step

    def _step(self, *args: Any) -> Any:
        self._stop()
        if self.seen == STEPS:
            self.end()
        self.steps += 1
        if self.steps <= WARM or self.objective.step != self._step:
            return self._inner(*args)
        self._begin()
        with record_function(STEP):
            result = self._inner(*args)
        self.tokens += result.tokens
        return result

    def apart(self, work: Callable[..., T]) -> Callable[..., T]:
        """`work`, whose time is not the training's."""

        def done(*args: Any) -> T:
            start = time.perf_counter()
            with record_function(APART):
                result = work(*args)
            self.away += time.perf_counter() - start
            return result

        return done

    def end(self) -> None:
        """Tell what was seen, where that has not been done."""
        self._stop()
        if self.objective.step != self._step:
            return
        self.objective.step = self._inner
        if not self.seen:
            self.note(f"no profile: the training had no more than {WARM} steps")
            return
        for line in self._lines():
            self.note(line)

    def _begin(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to stderr that it starts
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self._profiler = profile(activities=kinds, with_flops=True)
        self._profiler.start()
        self.start, self.away = time.perf_counter(), 0.0

    def _stop(self) -> None:
        if self._profiler is None:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.start - self.away
        self._profiler.stop()
        parts, flops = sorted_out(self._profiler.events(), cuda)
        self._profiler = None
        parts[BETWEEN] = max(0.0, seconds - sum(parts.values()))
        self.parts.update(parts)
        self.seen, self.seconds, self.flops = self.seen + 1, self.seconds + seconds, self.flops + flops

    def _lines(self) -> list[str]:
        hidden, inner = widths(config_of(self.objective.body))
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        most = ceiling.rate(hidden, inner, dtype, self.device)
        rate = self.flops / self.seconds
        speed = f"{self.seconds:.2f} s, {self.tokens / self.seconds:,.0f} tokens/s"
        return [
            f"where the time goes: {self.seen} steps, {speed}",
            *(f"  {name:24} {seconds / self.seconds:6.1%}" for name, seconds in self.parts.most_common()),
            f"  {rate / 1e9:,.0f} GFLOP/s of matrix products: {rate / most:.0%} of the {most / 1e9:,.0f} that this "
            f"machine was measured to do in {self.precision}",
        ]


def sorted_out(events: Any, cuda: bool) -> tuple[dict[str, float], float]:
    """Seconds by part, and floating-point operations of matrix products, of torch's events; what was apart is left out.

    On a GPU seconds are those of its kernels; that it waits is then the rest.
    """
    parts: Counter[str] = Counter()
    flops = 0.0
    for event in events:
        names = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        if APART in names:
            continue
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        parts[part_of(names)] += took / 1e6
        # torch counts additions and products of single numbers too.
        flops += (event.flops or 0) if any(word in event.name for word in OWN[PRODUCTS]) else 0
    return dict(parts), flops


def part_of(names: list[str]) -> str:
    """The part of an operation, by its own name and those of what it is inside of."""
    if names[0] == STEP:
        return PYTHON
    for part, words in INSIDE.items():
        if any(word in name for name in names for word in words):
            return part
    for part, words in OWN.items():
        if any(word in names[0] for word in words):
            return part
    return OTHER
