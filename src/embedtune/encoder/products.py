"""Matrix products of inference on a CPU by oneDNN, which torch itself takes for bf16 but not for fp32.

torch's fp32 product is MKL's. On an AMD processor with AVX-512 it was measured at less than half of oneDNN's rate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> None:
    """Let every plain linear layer compute by oneDNN where no gradient is wanted; elsewhere nothing changes."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, module.weight, module.bias)
    if x.numel() == x.shape[-1]:  # oneDNN sums one row alone in another order: a text of one token would show it
        return _linear(module, x.expand(2, *x.shape).reshape(2, -1))[:1].view(*x.shape[:-1], -1)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
    return product
