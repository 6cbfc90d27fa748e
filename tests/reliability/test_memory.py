"""Out of memory: the token budget halves, the batch and the result stay; where one row is too much, it is said."""

import random

import pytest
import torch

from embedtune.errors import UserError
from embedtune.fit import checkpoint
from reliability import ledger
from reliability.lessons import DATA, STEPS, lesson

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
]  # fmt: skip
SAME = 1e-5


@pytest.fixture(scope="module")
def lessons(tiny_model, tmp_path_factory):
    made = {}

    def get(task):
        if task not in made:
            budget = 512 if task in ("contrastive", "scored") else 64  # the gradient cache splits more finely by itself
            made[task] = lesson(task, "fp32", tmp_path_factory.mktemp(task), tiny_model, budget)
        return made[task]

    return get


def watched(taught, monkeypatch, strikes):
    """Let the n-th backward pass of a step run out of memory, {step: [n, ...]}; n counts over all of its trials.

    Returns the rows of each step that went through, and how many backward passes it took.
    """
    passes, rows, inner, backward = {}, {}, taught.objective.step, torch.Tensor.backward
    now = []

    def step(number, epoch, batch, budget):
        now[:] = [number]
        found = inner(number, epoch, batch, budget)
        rows[number] = batch.tolist()
        return found

    def strike(self, *args, **more):
        if now:
            passes[now[0]] = passes.get(now[0], 0) + 1
            if passes[now[0]] in strikes.get(now[0], ()):
                raise ERRORS[sum(passes.values()) % len(ERRORS)]
        return backward(self, *args, **more)

    monkeypatch.setattr(taught.objective, "step", step)
    monkeypatch.setattr(torch.Tensor, "backward", strike)
    return rows, passes


def assert_same(found, expected):
    for name, weights in expected.items():
        if "key.bias" not in name:  # its gradient is zero but for rounding, which Adam scales up
            gap = float((found[name] - weights).abs().max())
            assert gap <= SAME, (name, gap)


@pytest.mark.target("A14")
@pytest.mark.parametrize("task", DATA)
def test_the_budget_halves_and_nothing_else_changes(lessons, tmp_path, monkeypatch, task):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    taught, draw = lessons(task), random.Random(task)
    with monkeypatch.context() as patch:
        rows, passes = watched(taught, patch, {})
        taught.run(tmp_path / "whole").go([])
    expected, passes = taught.weights(), dict(passes)
    assert min(passes.values()) > 1, "there must be gradients that a second trial could count twice"
    for number in range(4):
        step = draw.randrange(STEPS)
        strikes = [draw.randrange(1, passes[step]) + number % 2]
        strikes += [strikes[0] + 1] * (number == 3)  # and again at once
        run = taught.run(tmp_path / str(number))
        with monkeypatch.context() as patch:
            again, _ = watched(taught, patch, {step: strikes})
            assert run.go([]) == "all steps done"
        budget = taught.loop.max_tokens // 2 ** len(strikes)
        said = [note for note in taught.notes if "out of memory, token budget halved to" in note]
        assert len(said) == len(strikes) and said[-1].startswith(f"step {step}: ") and said[-1].endswith(f" {budget}")
        assert again == rows and run.state.max_tokens == budget
        assert_same(taught.weights(), expected)
        ledger.count()


@pytest.mark.target("A14")
@pytest.mark.parametrize("task", ["mlm", "contrastive", "tag"])
def test_resumed_it_splits_its_batches_as_before(lessons, tmp_path, monkeypatch, task):
    taught = lessons(task)
    with monkeypatch.context() as patch:
        watched(taught, patch, {2: [1]})
        taught.run(tmp_path / "whole").go([])
    expected = taught.weights()
    run = taught.run(tmp_path / "cut")
    with monkeypatch.context() as patch:
        watched(taught, patch, {2: [1]})
        for _ in range(3):
            run._step()
        run._save()
    resumed = taught.again(tmp_path / "cut")
    resumed.continue_from(*checkpoint.newest(tmp_path / "cut" / "checkpoints"))
    resumed.go([])
    assert all(torch.equal(weights, expected[name]) for name, weights in taught.weights().items())


@pytest.mark.target("A14")
def test_one_row_that_is_too_much_ends_the_run_in_words(lessons, tmp_path, monkeypatch):
    taught = lessons("classify")
    run = taught.run(tmp_path / "home")
    run._step()
    run._save()
    watched(taught, monkeypatch, {1: range(1, 10**6)})
    with pytest.raises(UserError, match="step 1: out of memory, though the batch is taken row by row"):
        run._step()
    assert len(taught.notes) == 6 and run.state.max_tokens == 1  # 64 halved to 1
    assert checkpoint.newest(tmp_path / "home" / "checkpoints")[0].step == 1
