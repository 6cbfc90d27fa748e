"""Resuming at step 10^6 of an epoch of 10^7 rows: counted, not timed; the seconds stand under the table."""

import time

import numpy as np
import pytest
import torch

from embedtune.fit import batches, checkpoint, engine, order
from embedtune.fit.checkpoint import State
from embedtune.fit.engine import Listener, Step
from embedtune.recipes import Loop
from reliability import ledger

pytestmark = pytest.mark.target("A10")
ROWS, FAR, BATCH = 10**7, 10**6, 8


class Wide:
    """An objective over rows that nobody has: all that is asked for is written down."""

    head, head_steps, most_tokens, size = (), 0, None, ROWS

    def __init__(self, rows):
        self.rows, self.asked = rows, []
        self.model = self.body = torch.nn.Linear(2, 1)

    def step(self, step, epoch, rows, max_tokens):
        self.asked.append((step, epoch, len(rows)))
        self.model(torch.ones(1, 2)).sum().backward()
        return Step(1.0, len(rows))


def counted(monkeypatch, module):
    """How many places of the order each call works out."""
    touched, inner = [], module.permutation
    monkeypatch.setattr(module, "permutation", lambda p, *more: touched.append(len(p)) or inner(p, *more))
    return touched


@pytest.mark.parametrize("kind", ["any rows", "no two alike"])
def test_resuming_touches_the_rows_of_its_batches(tmp_path, monkeypatch, kind):
    touched = counted(monkeypatch, order if kind == "any rows" else batches)
    if kind == "any rows":
        objective = Wide(lambda step, batch, seed: order.batch_rows(step, batch, ROWS, seed))
    else:
        keys = np.broadcast_to(np.arange(ROWS, dtype=np.int32)[:, None], (ROWS, 2))
        distinct = batches.DistinctOrder(keys, BATCH, 1)
        objective = Wide(lambda step, batch, seed: distinct.rows(step))
    weights = dict(objective.model.named_parameters())
    folder = tmp_path / "checkpoints"
    checkpoint.save_best(folder, FAR - 5, {name: p.detach() for name, p in weights.items()})
    checkpoint.save(folder, State(step=FAR, best=1.0, best_step=FAR - 5, scored=FAR, max_tokens=64),
                    {f"weight.{name}": p.detach() for name, p in weights.items()})  # fmt: skip
    (tmp_path / "log.jsonl").write_text("")
    loop = Loop(batch=BATCH, epochs=1, max_steps=FAR + 3, lr=1e-3, log_steps=1, eval_steps=10**9, max_tokens=64,
                precision="fp32", measure="dev_loss", seed=1)  # fmt: skip
    start, first = time.perf_counter(), []
    listener = Listener(step=lambda record, total: first.append(time.perf_counter() - start))
    engine.train(objective, loop, lambda step: {"dev_loss": 2.0}, tmp_path, lambda: None, listener)
    assert objective.asked == [(FAR + n, 0, BATCH) for n in range(3)]
    # A window of 64 batches is laid out at once where no two rows of a batch may be alike.
    assert touched == ([BATCH] * 3 if kind == "any rows" else [BATCH * batches.WINDOW])
    ledger.remark(f"A10: {first[0]:.3f} s from the start to the end of step {FAR + 1:,}, {kind}")
