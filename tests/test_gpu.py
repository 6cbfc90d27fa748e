"""What only a GPU shows: its own attention kernel, its arithmetic beside the CPU's, compiled layers, memory that ends.

`make gpu` runs these, and once more those of the other tests that are to hold on a GPU too (the mark also_gpu).
"""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from conftest import PACKED, corpus
from embedtune import finetune, recipes
from embedtune.encoder import varlen
from embedtune.encoder.embed import embed
from embedtune.encoder.embedder import load_embedder
from embedtune.errors import Interrupted
from embedtune.fit import engine
from embedtune.fit.engine import Listener
from embedtune.recipes import MLM, Contrastive, Loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (make gpu looks for one)"),
]
LINES = [line for line in corpus(200, seed=3).splitlines() if len(line.split()) > 5]
PAIRS = [{"anchor": " ".join(line.split()[:3]), "positive": " ".join(line.split()[3:])} for line in LINES]
LOOP = {"batch": 16, "lr": 3e-3, "log_steps": 1, "eval_steps": 5, "max_steps": 20, "epochs": 50}


def near(found, wanted, tolerance):
    """Whether the norm of the difference is a small share of the norm, or what rounding leaves of numbers about one."""
    gap = float((found.float().cpu() - wanted.float()).norm())
    return gap <= tolerance * float(wanted.norm()) + 1e-5 * wanted.numel() ** 0.5


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 130, 64], [600, 3, 513]])
def test_attention_and_its_gradients_are_those_of_the_cpu(lengths, window):
    draw = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(sum(lengths), 4, 64, generator=draw).bfloat16() for _ in range(4))
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = varlen.packed_attention(*inputs, ends.to(device), max(lengths), 0.2, window)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, g.to(device, dtype))))
    for theirs, ours in zip(*found):
        assert near(ours, theirs, 0.02)


@pytest.mark.parametrize("kind", PACKED)
def test_vectors_are_those_of_the_cpu(tiny_model, kind):
    model = load_embedder(tiny_model(kind))[0]
    wanted = np.concatenate([part.vectors for part in embed(model.to("cpu"), LINES)])
    assert model.device.type == "cpu"
    found = np.concatenate([part.vectors for part in embed(model.to("cuda"), LINES)])
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)
    half = load_embedder(tiny_model(kind), "bf16")[0].to("cuda")
    rough = np.concatenate([part.vectors for part in embed(half, LINES)])
    cosine = (rough * wanted).sum(1) / np.linalg.norm(rough, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.99


def recipe_of(task, model, **changes):
    loop = Loop(**{**LOOP, **changes})
    if task == "mlm":
        return MLM(train=LINES, dev=LINES[:20], model=str(model), max_length=64, loop=loop)
    return Contrastive(train=PAIRS, dev=PAIRS[:20], model=str(model), allow_leaks=True, loop=loop)


def losses(folder):
    return np.array([record["loss"] for record in engine.read_log(folder) if record.get("loss") is not None])


@pytest.mark.parametrize("task", ["mlm", "contrastive"])
def test_the_loss_curve_is_that_of_the_cpu(tiny_model, task, tmp_path, monkeypatch):
    model = tiny_model("minilm" if task == "contrastive" else "bert")
    fast = finetune(recipe_of(task, model, precision="fp32"), tmp_path / "gpu").folder
    rough = finetune(recipe_of(task, model, precision="bf16"), tmp_path / "bf16").folder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slow = finetune(recipe_of(task, model, precision="fp32"), tmp_path / "cpu").folder
    np.testing.assert_allclose(losses(fast), losses(slow), rtol=2e-3)
    np.testing.assert_allclose(losses(rough), losses(slow), rtol=0.05)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("task", ["mlm", "contrastive"])
def test_a_stopped_run_in_bf16_ends_as_one_that_was_not(tiny_model, task, compiled, tmp_path):
    """Compiled layers are made for the first batch that they see, so a resumed run is the same to rounding."""
    recipe = recipe_of(task, tiny_model("minilm" if task == "contrastive" else "bert"), compile=compiled, lr=1e-3)

    def step(record, total):
        if record.get("loss") is not None and record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = finetune(recipe, tmp_path / "whole").folder
    again = finetune(recipe, tmp_path / "again").folder
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "cut", listener=Listener(step=step))
    cut = finetune(recipe, tmp_path / "cut", resume=True).folder
    np.testing.assert_allclose(losses(cut), losses(whole), rtol=0.02)
    if not compiled:
        assert (losses(cut) == losses(whole)).all() and (losses(again) == losses(whole)).all()
        same = [(folder / "model.safetensors").read_bytes() for folder in (whole, again, cut)]
        assert same[0] == same[1] == same[2]


def test_compiled_layers_learn_as_the_others_do(tiny_model, tmp_path):
    runs = [finetune(recipe_of("mlm", tiny_model("modernbert"), compile=c), tmp_path / str(c)) for c in (False, True)]
    plain, fast = (losses(run.folder) for run in runs)
    np.testing.assert_allclose(fast, plain, rtol=0.02)
    assert "compile = true" in (runs[1].folder / "recipe.toml").read_text()


def test_memory_that_ends_halves_the_micro_batch_and_not_the_batch(tiny_model, tmp_path):
    wide = recipe_of("mlm", tiny_model("bert"), precision="fp32", max_tokens=100_000, batch=128, max_steps=4)
    plain = finetune(wide, tmp_path / "plain").folder
    total = torch.cuda.get_device_properties(0).total_memory
    for megabytes in (48, 32, 24, 16, 12, 8):  # until it is too little
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + megabytes * 2**20) / total)
        notes = []
        try:
            tight = finetune(wide, tmp_path / "tight", listener=Listener(notes.append), force=True).folder
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        np.testing.assert_allclose(losses(tight), losses(plain), rtol=1e-4)
        if any("out of memory, token budget halved" in note for note in notes):
            return
    raise AssertionError("memory never ran out")


def test_what_a_gpu_calls_for_is_derived_and_written_down(tiny_model, tmp_path):
    folder = finetune(recipe_of("mlm", tiny_model("bert")), tmp_path / "out").folder
    text = (folder / "recipe.toml").read_text()
    assert 'precision = "bf16"' in text and "compile = false" in text
    assert dataclasses.asdict(recipes.Loop())["compile"] is None
