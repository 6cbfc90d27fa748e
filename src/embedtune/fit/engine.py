"""The loop: batch, step, clip, update, log, score, checkpoint, stop. Every objective runs through it.

Nothing random has a state here: which rows a step takes is arithmetic (order.py), noise is keyed (dropout.py), so
a run that was killed and resumed ends with the same bits as one that was not (with compiled layers: to rounding).
Several processes go through it side by side: what they decide is agreed on, and only the first one writes (ranks.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from embedtune import files
from embedtune.errors import Interrupted, UserError
from embedtune.fit import checkpoint, gpu, order, ranks, signals
from embedtune.fit.checkpoint import State
from embedtune.fit.optimizer import BODY, HEAD, Optimizer
from embedtune.fit.schedule import factor
from embedtune.recipes import BATCH, EPOCHS, Loop

HEAD_RATE = 1e-3  # learning rate of a fresh head while it is trained alone
MOST_SKIPPED = 3  # steps in a row whose gradients were not finite
PLOT_SECONDS = 60
SAVE_SECONDS, SAVE_SHARE = 30, 50  # derived checkpoints: so long apart, and so many times as long as one takes
FALLING = ("loss", "perplexity", "ECE", "MAE", "RMSE")  # measures of which less is better


class Step(NamedTuple):
    """What a process reports of its share of a batch: the mean loss, the real (not padded) tokens, what it weighs."""

    loss: float | Tensor  # see `unread`
    tokens: int
    weight: float = 1.0  # beside the shares of other processes


def unread(loss: Tensor) -> float | Tensor:
    """A () loss as a `Step` has it: a number, or on a GPU what becomes one once the GPU has come that far."""
    return loss.double() if loss.is_cuda else float(loss)


class Objective(Protocol):
    """The only seam between the loop and a task."""

    head: list[str]  # parameters that are trained alone for `head_steps` steps
    head_steps: int
    most_tokens: int | None  # more than these in a forward pass bring nothing

    @property
    def model(self) -> torch.nn.Module:
        """The model that is trained."""

    @property
    def body(self) -> torch.nn.Module:
        """The part of it that may compute in bf16."""

    @property
    def size(self) -> int:
        """Training rows."""

    def rows(self, step: int, batch: int, seed: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of a step: a pure function, so that resuming needs no replay."""

    def step(self, step: int, epoch: int, rows: np.ndarray, max_tokens: int) -> Step:
        """Leave the gradients of the mean loss of this process's share of `rows`, in micro-batches of `max_tokens`.

        Out of memory it is called again with fewer tokens, on this process alone: what needs the others is done once.
        An objective may also have `ahead(step, epoch, rows)`, which makes ready what needs no model.
        """

    def save(self, folder: Path) -> None:
        """Write the standard model folder."""


@dataclass(frozen=True)
class Listener:
    """Where the loop speaks: a line of text, and one record per logged step."""

    note: Callable[[str], None] = lambda text: None
    step: Callable[[dict[str, Any], int], None] = lambda record, total: None


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    state: State
    total: int
    why: str
    best_step: int


def total_steps(loop: Loop, size: int, head_steps: int) -> int:
    """Optimizer steps of a run: those of the epochs (capped by max_steps), after those of the head alone."""
    steps = max(1, math.ceil((loop.epochs or EPOCHS) * order.steps_per_epoch(size, loop.batch or BATCH)))
    return head_steps + (min(steps, loop.max_steps) if loop.max_steps else steps)


def train(
    objective: Objective,
    loop: Loop,
    score: Callable[[int], dict[str, float]],
    home: Path,
    draw: Callable[[], None],
    listener: Listener,
) -> Outcome:
    """Train `objective` in place; `home` keeps log and checkpoints. The model ends with the best-scoring weights.

    `loop` must be resolved (derive.py): no None but max_steps, minutes, patience, checkpoint_steps and, of a run that
    an older version began, compile. `score(step)` gives the dev measures; only the first process is asked. Continues
    from the newest valid checkpoint under `home`.
    Raises Interrupted after a signal, its checkpoint written.
    """
    total = total_steps(loop, objective.size, objective.head_steps)
    ranks.same_weights(objective.model)
    compute = objective.body if loop.precision == "bf16" else None
    optimizer = Optimizer(objective.model, objective.head, loop.weight_decay, compute, loop.layer_decay)
    run = Run(objective, loop, optimizer, score, home, draw, listener, total)
    found = ranks.together(lambda: checkpoint.newest(run.checkpoints))
    if found is not None:
        run.continue_from(*found)
    else:
        ranks.first(lambda: files.write_text(home / "log.jsonl", ""))
    with gpu.compiled(objective.body, bool(loop.compile)), signals.caught() as stopped:
        why = run.go(stopped)
    best = run.state.best_step
    if best is None:
        raise UserError(f"{loop.measure} was never a finite number, so no step can be called the best", where=str(home))
    optimizer.load_weights(ranks.together(lambda: checkpoint.load_best(run.checkpoints, best)))
    optimizer.release()
    return Outcome(run.state, total, why, best)


class Run:
    """One training in progress: the state that changes from step to step, and what it is written to."""

    def __init__(
        self,
        objective: Objective,
        loop: Loop,
        optimizer: Optimizer,
        score: Callable[[int], dict[str, float]],
        home: Path,
        draw: Callable[[], None],
        listener: Listener,
        total: int,
    ) -> None:
        self.objective, self.loop, self.optimizer, self.score = objective, loop, optimizer, score
        self.home, self.draw, self.listener, self.total = home, draw, listener, total
        self.measure = loop.measure or "dev_loss"
        self.checkpoints = home / "checkpoints"
        self.state = State(max_tokens=loop.max_tokens or 0)
        self.clock = self.drawn = self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        self.logged_at = 0.0
        self.saved: State | None = None
        self.urgent = False

    def continue_from(self, state: State, tensors: dict[str, torch.Tensor], remarks: list[str]) -> None:
        """Take over a checkpoint, and cut the log back to it."""
        for remark in remarks:
            self.listener.note(remark)
        self.state = state
        self.optimizer.load(tensors)
        ranks.first(self._cut_log)
        self.logged_at, state.log_tokens = state.seconds, 0  # a rate is of this process's own work
        self.listener.note(f"resumed at step {state.step:,} of {self.total:,}")

    def _cut_log(self) -> None:
        kept = [json.dumps(r, allow_nan=False) for r in read_log(self.home) if checkpoint.knows(self.state, r)]
        files.write_text(self.home / "log.jsonl", "".join(line + "\n" for line in kept))

    def go(self, stopped: list[int]) -> str:
        """Step until something says stop; returns what did."""
        state, loop = self.state, self.loop
        if state.step == 0:
            self._evaluate()
        while (why := self._why_stop()) is None:
            self._step()
            stop, due = self._agree(stopped)
            if state.step % (loop.log_steps or 1) == 0:
                self._log()
            if state.step % (loop.eval_steps or 1) == 0 or state.step == self.objective.head_steps:
                self._evaluate()
            if ranks.world()[1] == 1:  # of several processes all must hear of a signal, which is after the next step
                stop = max(stopped, default=0)
            if stop or due:
                path = self._save()
                if stop:
                    message = f"stopped by signal {stop}; checkpoint {path}\n  continue: the same command, --resume"
                    raise Interrupted(message, 128 + stop)
        if state.loss_steps:
            self._log()
        if state.scored != state.step:
            self._evaluate()
        if self.saved != state:
            self._save()
        return why

    def _agree(self, stopped: list[int]) -> tuple[int, bool]:
        """The signal to stop after (or 0), and whether to save: what clocks, signals and memory say is made common.

        The slowest clock counts, the smallest token budget, and a signal to any process.
        """
        state = self.state
        mine = [state.seconds, -state.max_tokens, max(stopped, default=0), self.urgent or self._save_is_due()]
        state.seconds, budget, stop, due = ranks.most(mine)
        if state.max_tokens > -budget:
            state.max_tokens = int(-budget)
            self._event(
                f"step {state.step - 1}: out of memory in another process, token budget cut to {state.max_tokens:,}"
            )
        return int(stop), bool(due)

    def _save_is_due(self) -> bool:
        """After so many steps where they are given, else by the clock: what a kill may cost is time, not steps."""
        if self.loop.checkpoint_steps:
            return self.state.step % self.loop.checkpoint_steps == 0
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, SAVE_SHARE * self.save_seconds)

    def _why_stop(self) -> str | None:
        state, loop = self.state, self.loop
        if state.step >= self.total:
            return "all steps done"
        if loop.patience is not None and state.stale >= loop.patience:
            return f"{self.measure} did not get better in {loop.patience} scorings"
        if loop.minutes is not None and state.seconds >= 60 * loop.minutes:
            return f"{loop.minutes:g} minutes are over"
        return None

    def _step(self) -> None:
        state, loop = self.state, self.loop
        epoch, rows = self.objective.rows(state.step, loop.batch or BATCH, loop.seed)
        result = self._forward_backward(epoch, rows)
        self._look_ahead()
        # Told with the loss, what only one process has is known to all; where one skips alone, all wait for ever.
        mine = float(result.loss + self.optimizer.flaw())
        loss, tokens = ranks.mean_gradients([*self.optimizer.masters.values()], result.weight, mine, result.tokens)
        norm = self.optimizer.clip(loop.clip)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(self._rates(state.step))
            state.skipped = 0
            state.loss_sum += loss
            state.loss_steps += 1
        else:
            self._skip(rows, loss, norm)
        self.optimizer.clear()
        state.step += 1
        state.tokens += int(tokens)
        state.log_tokens += int(tokens)
        now = time.monotonic()
        state.seconds += now - self.clock
        self.clock = now

    def _look_ahead(self) -> None:
        """Make ready what of the next step needs no model, while a GPU is still busy with this one."""
        ahead = getattr(self.objective, "ahead", None)
        if ahead is not None and self.state.step + 1 < self.total and torch.cuda.is_available():
            step = self.state.step + 1
            ahead(step, *self.objective.rows(step, self.loop.batch or BATCH, self.loop.seed))

    def _rates(self, step: int) -> dict[str, float]:
        """Learning rate of head and body at `step` (0-based)."""
        head_steps = self.objective.head_steps
        if step < head_steps:
            return {HEAD: HEAD_RATE, BODY: 0.0}
        scale = factor(step - head_steps, self.total - head_steps, self.loop.schedule, self.loop.warmup)
        rate = (self.loop.lr or 0.0) * scale
        return {HEAD: rate, BODY: rate}

    def _forward_backward(self, epoch: int, rows: np.ndarray) -> Step:
        """The objective's step; out of memory halves the token budget and tries again, the batch unchanged."""
        while True:
            try:
                return self.objective.step(self.state.step, epoch, rows, self.state.max_tokens)
            except (RuntimeError, MemoryError) as error:
                if gpu.give_up_order(error):
                    self._event("this loss sums in no fixed order on a GPU: runs repeat to rounding, not to the bit")
                    self.optimizer.clear()
                    continue
                if not gpu.out_of_memory(error):
                    raise
                if self.state.max_tokens <= 1:
                    what = "out of memory, though the batch is taken row by row"
                    fix = "a smaller --max-length, or a smaller model"
                    raise ranks.alone(UserError(what, where=f"step {self.state.step}", fix=fix)) from error
            self.optimizer.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.state.max_tokens //= 2
            self.urgent = True  # so that a resumed run splits its batches as this one does from here on
            self._event(f"step {self.state.step}: out of memory, token budget halved to {self.state.max_tokens:,}")

    def _skip(self, rows: np.ndarray, loss: float, norm: float) -> None:
        state = self.state
        state.skipped += 1
        self._event(
            f"step {state.step}: loss {loss} (or a weight), or norm {norm} of gradients, is not finite; rows "
            f"{rows[:8].tolist()}{'...' if len(rows) > 8 else ''}: update left out"
        )
        record = {"step": state.step + 1, "seconds": round(state.seconds, 3), "left_out": rows.tolist()}
        ranks.first(lambda: files.append_line(self.home / "log.jsonl", json.dumps(record)))
        if state.skipped >= MOST_SKIPPED:
            raise UserError(
                f"training diverged: {MOST_SKIPPED} steps in a row without finite gradients and weights",
                where=f"step {state.step}",
                fix=f"a smaller --lr (it is {self.loop.lr:g}) or --precision fp32",
            )

    def _event(self, text: str) -> None:
        self.state.events.append(text)
        self.listener.note(text)

    def _log(self) -> None:
        state = self.state
        head = state.step <= self.objective.head_steps
        # A rate over a clock that stood still (tests with tiny steps) is left at 0 rather than infinite.
        seconds = state.seconds - self.logged_at
        record = {
            "step": state.step,
            "epoch": round(state.step / order.steps_per_epoch(self.objective.size, self.loop.batch or BATCH), 6),
            "loss": state.loss_sum / state.loss_steps if state.loss_steps else None,
            "lr": self._rates(state.step - 1)[HEAD if head else BODY],
            "tokens_per_second": round(state.log_tokens / seconds) if seconds > 0 else 0,
            "seconds": round(state.seconds, 3),
        }
        if head:
            record["head_only"] = True
        state.loss_sum, state.loss_steps, state.log_tokens, self.logged_at = 0.0, 0, 0, state.seconds
        self._write(record)

    def _evaluate(self) -> None:
        state = self.state
        state.scored = state.step
        scored = ranks.first(lambda: self.score(state.step))
        measures = {k: v for k, v in scored.items() if math.isfinite(v)}
        self._write({"step": state.step, "seconds": round(state.seconds, 3), **measures})
        value = measures.get(self.measure)
        # While a fresh head is trained alone there is nothing yet that could be better or worse, unless it ends there.
        if value is None or (state.step < self.objective.head_steps and self._why_stop() is None):
            return
        if state.best is None or better(self.measure, value, state.best):
            state.best, state.best_step, state.stale = value, state.step, 0
            weights = {n: m.detach() for n, m in self.optimizer.masters.items()}
            ranks.first(lambda: checkpoint.save_best(self.checkpoints, state.step, weights))
        else:
            state.stale += 1
        # Scoring is not training: neither --minutes nor the token rate counts it.
        ranks.first(self._draw)
        self.clock = time.monotonic()

    def _draw(self) -> None:
        if time.monotonic() - self.drawn > PLOT_SECONDS:
            self.draw()
            self.drawn = time.monotonic()

    def _save(self) -> Path:
        start = time.monotonic()
        path = Path(ranks.first(self._write_checkpoint))
        self.saved, self.urgent = dataclasses.replace(self.state), False
        self.clock = self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start
        return path

    def _write_checkpoint(self) -> str:
        files.flush(self.home / "log.jsonl")  # a checkpoint is never newer than its log, whatever the power does
        return str(checkpoint.save(self.checkpoints, self.state, self.optimizer.state()))

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False)
        ranks.first(lambda: files.append_line(self.home / "log.jsonl", line))
        self.listener.step(record, self.total)


def better(measure: str, value: float, than: float) -> bool:
    """Whether a measure got better: losses, perplexities and errors fall, everything else rises."""
    return value < than if any(word in measure for word in FALLING) else value > than


def read_log(home: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl; a line torn by a kill ends it."""
    records = []
    path = home / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
