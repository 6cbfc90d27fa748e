"""Compiled layers, with a compiler that only traces: they learn the same, are put back, and score as they are."""

import numpy as np
import pytest
import torch

from embedtune.encoder import heads
from embedtune.fit import gpu


class Tracer:
    """Stands in for torch.compile: counts the calls of what it was given."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function, **options):
        assert options == {"dynamic": True}

        def run(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return run


@pytest.fixture
def compiler(monkeypatch):
    tracer = Tracer()
    monkeypatch.setattr(torch, "compile", tracer)
    return tracer


def test_from_the_second_step_on_and_only_in_training(tiny_model, compiler):
    loaded = heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, ("a", "b"))
    rows, layers = [np.arange(5, 12)], gpu.layers_of(loaded.model)[1]
    with gpu.compiled(loaded.model, True):
        loaded.model.eval()
        wanted = heads.row_logits(loaded, rows)
        assert compiler.calls == 0
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loaded.model.train()
        for step in range(3):
            torch.testing.assert_close(heads.row_logits(loaded, rows), wanted)
            assert compiler.calls == step * len(layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_layer_that_something_else_stands_in_for_is_put_back(tiny_model, compiler):
    """The layer that means is one of those that are compiled, and its work on all tokens is left out."""
    loaded = heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, ("a", "b"), pooling="mean")
    layers = gpu.layers_of(loaded.model)[1]
    with gpu.compiled(loaded.model, True):
        loaded.model.eval()
        first = heads.row_logits(loaded, [np.arange(5, 12)])
        assert all("forward" in vars(layer) for layer in layers)
        torch.testing.assert_close(heads.row_logits(loaded, [np.arange(5, 12)]), first)
    assert not any("forward" in vars(layer) for layer in layers)


def test_without_the_wish_or_without_layers_nothing_changes(tiny_model, compiler):
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with gpu.compiled(plain, True):
        assert "forward" not in vars(plain[0])
    layers = gpu.layers_of(heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, ("a", "b")).model)[1]
    with gpu.compiled(torch.nn.ModuleList([layers]), False):
        assert not any("forward" in vars(layer) for layer in layers)


def test_only_an_error_about_order_gives_up_the_order():
    error = RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")
    assert not gpu.give_up_order(error)  # no order was asked for
    torch.use_deterministic_algorithms(True)
    try:
        assert not gpu.give_up_order(RuntimeError("CUDA error"))
        assert gpu.give_up_order(error) and not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
