"""What a GPU needs beyond the loop: compiled layers, losses that know no order of sums, memory that ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def give_up_order(error: BaseException) -> bool:
    """Go on without a fixed order of sums, where `error` says that an operation knows none; else False."""
    if "deterministic implementation" not in str(error) or not torch.are_deterministic_algorithms_enabled():
        return False
    torch.use_deterministic_algorithms(False)
    return True


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the layers of an encoder, which are its longest list of modules; None where it has no list."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda found: len(found[1])) if stacks else None


@contextmanager
def compiled(body: nn.Module, wanted: bool) -> Iterator[None]:
    """While this holds, the layers of `body` are compiled for training, in place; scoring runs them as they are.

    Layers of one kind share their code, whatever the number of tokens. What cannot be compiled runs as it is, and so
    does each layer's first step, which makes what it keeps (the tables of its dropout).
    """
    found = layers_of(body) if wanted else None
    if found is None:
        yield
        return
    import torch._dynamo

    for layer in found[1]:
        layer.forward = _in_training(layer)
    try:
        with torch._dynamo.config.patch(suppress_errors=True):
            yield
    finally:
        for layer in found[1]:
            del layer.forward


def _in_training(layer: nn.Module) -> Callable[..., Any]:
    plain, started = layer.forward, False
    fast = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        run = fast if layer.training and started else plain
        started = started or layer.training
        return run(*args, **kwargs)

    return forward


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
