"""--profile: parts of the time that add up, and a training that ends with the same bits."""

import re

import pytest

from conftest import corpus
from embedtune import MLM, Classify, Contrastive, Loop, finetune
from embedtune.fit import ceiling, profiled
from embedtune.fit.engine import Listener
from embedtune.fit.profiled import OTHER, PYTHON, STEP, part_of

QUICK = {"batch": 8, "lr": 1e-3, "max_tokens": 256, "precision": "fp32", "eval_steps": 100}


def rows(task):
    lines = [line for line in corpus(300, seed=3).splitlines() if line]
    if task is MLM:
        return lines
    if task is Classify:
        return [{"text": line, "label": "odd" if len(line) % 2 else "even"} for line in lines[:120]]
    return [{"anchor": line, "positive": other} for line, other in zip(lines[:120], lines[120:])]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Torch's profiler takes seconds for each of the steps that it watches."""
    for module, name, number in ((profiled, "WARM", 2), (profiled, "STEPS", 4), (ceiling, "TRIES", 2)):
        monkeypatch.setattr(module, name, number)


@pytest.fixture
def trained(tiny_model, tmp_path):
    """trained(task, out, profile, steps) -> (weights' bytes, notes)."""

    def run(task, out, profile, steps=8):
        notes = []
        recipe = task(train=rows(task), model=str(tiny_model("minilm")), loop=Loop(max_steps=steps, epochs=20, **QUICK))
        finished = finetune(recipe, tmp_path / out, profile=profile, listener=Listener(notes.append))
        return (finished.folder / "model.safetensors").read_bytes(), notes

    return run


@pytest.mark.parametrize("task", [MLM, Contrastive, Classify])
def test_a_profile_adds_up_and_changes_nothing(trained, task):
    plain, quiet = trained(task, "plain", False)
    watched, notes = trained(task, "watched", True)
    assert watched == plain
    first = next(i for i, note in enumerate(notes) if note.startswith("where the time goes: 4 steps"))
    assert not any("where the time goes" in note for note in quiet)
    shares = [float(found[1]) for note in notes[first:] if (found := re.fullmatch(r"  .{24} +([\d.]+)%", note))]
    assert 99 < sum(shares) < 101
    said = "\n".join(notes[first:])
    assert {"matrix products", "attention", "optimizer", "data and Python"} <= set(
        re.findall(r"^  (\S.*?)  ", said, re.M)
    )
    rate, most = re.search(r"  ([\d,]+) GFLOP/s of matrix products: \d+% of the ([\d,]+) that", said).groups()
    assert int(most.replace(",", "")) > int(rate.replace(",", "")) >= 0


def test_a_training_that_is_too_short_says_so(trained):
    assert "no profile: the training had no more than 2 steps" in trained(Classify, "short", True, 2)[1]


def test_what_an_operation_is_inside_of_comes_first():
    assert part_of(["aten::bmm", "BlockAttention", STEP]) == "attention"
    assert part_of(["aten::addmm", "aten::linear", STEP]) == "matrix products"
    assert part_of(["aten::mul", "Optimizer.step#AdamW.step"]) == "optimizer"
    assert part_of(["aten::_log_softmax", "aten::cross_entropy_loss"]) == "loss"
    assert part_of([STEP]) == PYTHON
    assert part_of(["aten::something_new", STEP]) == OTHER
