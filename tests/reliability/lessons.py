"""Trainings without files around them: an objective of each task, taught a few steps again and again."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedtune import files, tune
from embedtune.fit.derive import resolve
from embedtune.fit.engine import Listener, Run, read_log, total_steps
from embedtune.fit.optimizer import Optimizer
from embedtune.recipes import RECIPES, Loop
from reliability.conftest import place
from reliability.test_kill_pairs import write_pairs

DATA = {
    "mlm": ("text.txt", "bert"), "contrastive": ("pairs.jsonl", "minilm"), "scored": ("scored.jsonl", "bert"),
    "classify": ("labels.jsonl", "bert"), "regress": ("scored.jsonl", "minilm"), "tag": ("tags.jsonl", "modernbert"),
}  # fmt: skip
STEPS = 5
LOOP = Loop(batch=16, max_steps=STEPS, epochs=99, lr=1e-3, log_steps=1, eval_steps=99,
            checkpoint_steps=1, measure="dev_loss")  # fmt: skip


@dataclass
class Lesson:
    """What can be taught from its start as often as one likes."""

    objective: Any
    loop: Loop
    optimizer: Optimizer
    start: dict
    notes: list = field(default_factory=list)

    def run(self, home: Path) -> Run:
        """A run at its start, the weights put back."""
        home.mkdir(parents=True)
        files.write_text(home / "log.jsonl", "")
        self.notes.clear()
        self.optimizer.clear()
        self.optimizer.load(self.start)
        return self.again(home)

    def again(self, home: Path) -> Run:
        """A run with the weights as they are."""
        total, listener = total_steps(self.loop, self.objective.size, 0), Listener(self.notes.append)
        return Run(self.objective, self.loop, self.optimizer, lambda step: {"dev_loss": 9.0 - step}, home,
                   lambda: None, listener, total)  # fmt: skip

    def weights(self) -> dict:
        return {name: master.detach().clone() for name, master in self.optimizer.masters.items()}


def lesson(task: str, precision: str, folder: Path, tiny_model, max_tokens: int = 512) -> Lesson:
    """The objective of a task on tiny data, as a run of it would be prepared."""
    name, kind = DATA[task]
    place(folder, tiny_model(kind))
    write_pairs(folder)
    loop = dataclasses.replace(LOOP, precision=precision, max_tokens=max_tokens)
    recipe = RECIPES[task](train=str(folder / name), model=str(folder / "model"), loop=loop)
    ready = tune.prepare(recipe, folder / "home", lambda text: None)
    objective = ready.objective
    loop = resolve(loop, objective, ready.max_length, ready.lr)
    compute = objective.body if precision == "bf16" else None
    optimizer = Optimizer(objective.model, objective.head, loop.weight_decay, compute)
    start = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    return Lesson(objective, loop, optimizer, start)


def finite(tensors: dict) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def left_out(home: Path) -> dict:
    """By step, the rows whose update was left out, as the log says."""
    return {record["step"]: record["left_out"] for record in read_log(home) if "left_out" in record}
