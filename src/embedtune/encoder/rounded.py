"""A rounder number of tokens inside of an encoder on a GPU, so that the shapes of its products come back.

A product of a shape that was not seen before has its kernel looked for anew, and packed batches never have the same
number of tokens twice. The rows beyond are sequences of their own behind the others, which nobody reads.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

ARGUMENTS = ("input_ids", "attention_mask")  # as every encoder takes them by place


def beyond(tokens: int, device: torch.device) -> int:
    """How many rows an encoder on `device` computes beyond so many packed tokens.

    On a GPU up to one for 32 tokens (up to seven where there are fewer than 256); else none.
    """
    if device.type != "cuda":
        return 0
    return -tokens % max(8, 1 << max(0, tokens.bit_length() - 6))


def steady(backbone: torch.nn.Module) -> None:
    """On a GPU, round the number of packed tokens up inside of `backbone`, in place; what comes out is what went in.

    Its `forward` is replaced: hooks would not do, for sentence-transformers calls `forward` and not the module. A copy
    of the model has its own; nn.DataParallel, whose replicas are no copies, is not for such a model.
    """
    forward: Any = partial(_forward, backbone)
    forward.__signature__ = inspect.signature(backbone.forward)  # as who asks what it takes shall see it
    backbone.forward = forward


def _forward(backbone: Any, *args: Any, **kwargs: Any) -> Any:
    stock = type(backbone).forward
    named = {**dict(zip(ARGUMENTS, args)), **kwargs}  # stock heads hand on the ids by place
    ids = named.get("input_ids")
    if ids is None or named.get("cu_seq_lens_q") is None or len(args) > len(ARGUMENTS):
        return stock(backbone, *args, **kwargs)
    if not (more := beyond(ids.shape[1], ids.device)):
        return stock(backbone, *args, **kwargs)
    output = stock(backbone, **_wider(named, more))
    output["last_hidden_state"] = output.last_hidden_state[:, :-more]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, :-more] for states in output.hidden_states)
    return output


def _wider(kwargs: dict[str, Any], more: int) -> dict[str, Any]:
    """The same batch with `more` tokens behind the others."""
    ends, longest = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
    # Repeated, so that all of them are valid: the first token's id, position and type.
    names = [n for n in ("input_ids", "position_ids", "token_type_ids", "seq_idx") if kwargs.get(n) is not None]
    wider: dict[str, Any] = {n: torch.cat([kwargs[n], kwargs[n][:, :1].expand(-1, more)], 1) for n in names}
    steps = torch.arange(longest, more + longest, longest, dtype=ends.dtype, device=ends.device).clamp_(max=more)
    wider["cu_seq_lens_q"] = wider["cu_seq_lens_k"] = torch.cat([ends, ends[-1:] + steps])
    return {**kwargs, **wider}
