"""NaN and Inf in a batch, a weight, a gradient or the loss: found in that step, its rows named, never written."""

import itertools
import math
import random
from contextlib import contextmanager

import pytest
import torch

from embedtune.errors import UserError
from embedtune.fit import checkpoint
from embedtune.fit.engine import Step
from reliability import ledger
from reliability.lessons import finite, left_out, lesson

QUICK = [("mlm", "fp32"), ("mlm", "bf16"), ("contrastive", "fp32"), ("classify", "fp32"), ("tag", "bf16")]
REST = [("contrastive", "bf16"), ("classify", "bf16"), ("tag", "fp32"), ("scored", "fp32"), ("regress", "bf16")]
PLACES = ["batch", "weight", "gradient", "loss"]
VALUES = [math.nan, math.inf, -math.inf]


@pytest.fixture(scope="module")
def lessons(tiny_model, tmp_path_factory):
    made = {}

    def get(task, precision):
        if (task, precision) not in made:
            made[task, precision] = lesson(task, precision, tmp_path_factory.mktemp(task), tiny_model)
        return made[task, precision]

    return get


@contextmanager
def spoiled_token(model, value):
    """While this holds, one number of what the word embeddings give is `value`."""
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))

    def spoil(module, args, output):
        output = output.clone()
        output[..., 0, 0] = value
        return output

    handle = table.register_forward_hook(spoil)
    yield
    handle.remove()


def most_moved(taught, home):
    """By tensor that learns, the place of its largest gradient: a number that the batch does read."""
    run = taught.run(home)
    epoch, rows = taught.objective.rows(0, taught.loop.batch, taught.loop.seed)
    run._forward_backward(epoch, rows)
    learned = {name: m.grad for name, m in taught.optimizer.masters.items() if m.grad is not None and m.grad.any()}
    return {name: int(gradient.abs().argmax()) for name, gradient in learned.items()}


def spoil(taught, monkeypatch, where, value, at, spot):
    """Put `value` into one place at step `at`."""
    inner, (name, index) = taught.objective.step, spot
    working = dict(taught.objective.model.named_parameters())[name]
    master = taught.optimizer.masters[name]

    def step(number, *given):
        if number != at:
            return inner(number, *given)
        if where == "batch":
            with spoiled_token(taught.objective.model, value):
                return inner(number, *given)
        if where == "weight":
            for tensor in (working, master):
                tensor.data.view(-1)[index] = value
        found = inner(number, *given)
        if where == "gradient":
            master.grad.view(-1)[index] = value
        return Step(value, found.tokens) if where == "loss" else found

    monkeypatch.setattr(taught.objective, "step", step)


@pytest.mark.target("A13")
@pytest.mark.parametrize("task, precision", [*QUICK, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in REST)])
def test_what_is_not_finite_is_found_in_its_step(lessons, tmp_path, monkeypatch, task, precision):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    taught, draw = lessons(task, precision), random.Random(task)
    spots = most_moved(taught, tmp_path / "clean")
    for where, value in itertools.product(PLACES, VALUES):
        home, at, name = tmp_path / f"{where}-{value}", draw.randrange(1, 4), draw.choice(list(spots))
        run = taught.run(home)
        with monkeypatch.context() as patch:
            spoil(taught, patch, where, value, at, (name, spots[name]))
            if where == "weight":  # what is wrong stays wrong: the run stops, its last checkpoint is sound
                with pytest.raises(UserError, match="training diverged"):
                    run.go([])
            else:
                assert run.go([]) == "all steps done"
                assert finite(taught.weights())
        said = [note for note in taught.notes if "is not finite; rows [" in note]
        assert len(said) == 1 and said[0].startswith(f"step {at}: "), (where, value, name, taught.notes)
        rows = taught.objective.rows(at, taught.loop.batch, taught.loop.seed)[1].tolist()
        assert left_out(home) == {at + 1: rows}
        state, tensors, remarks = checkpoint.newest(home / "checkpoints")
        assert state.step == (at if where == "weight" else taught.loop.max_steps) and not remarks
        assert finite(tensors) and finite(checkpoint.load_best(home / "checkpoints", state.best_step))
        ledger.count()


@pytest.mark.target("A13")
def test_a_weight_that_no_row_reads_is_found_too_and_not_written(lessons, tmp_path):
    """No loss and no gradient tells of it."""
    taught = lessons("classify", "fp32")
    run = taught.run(tmp_path / "home")
    run._step()
    kept = run._save()
    name = next(name for name in taught.optimizer.masters if "word_embeddings" in name)
    taught.optimizer.masters[name].data[1, 0] = math.nan  # [UNK], which no row has
    run._step()
    assert run.state.skipped == 1
    assert left_out(tmp_path / "home") == {2: taught.objective.rows(1, taught.loop.batch, taught.loop.seed)[1].tolist()}
    with pytest.raises(UserError, match="step-0000002: training diverged: 1 of .* tensors are not finite .*word_emb"):
        run._save()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    with pytest.raises(UserError, match="best-0000002: training diverged"):
        checkpoint.save_best(kept.parent, 2, taught.weights())
