"""Several processes as one: each embeds its share of a batch's texts, all see all vectors, gradients are summed.

Every process computes the whole loss on the gathered vectors (a small product beside the encoder's) and carries the
gradient of its own share back, so N processes do what one would do with the union, to the rounding of the sums.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """(this process's number, how many there are); (0, 1) where torch.distributed is not started."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def gather(vectors: Tensor, total: int) -> Tensor:
    """Vectors (m, D) of every process's share into (total, D), where process r holds the rows r, r + N, r + 2N, ..."""
    rank, count = world()
    if count == 1:
        return vectors
    most = -(-total // count)
    mine = vectors.new_zeros(most, vectors.shape[1])
    mine[: len(vectors)] = vectors
    parts = [torch.empty_like(mine) for _ in range(count)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).reshape(most * count, -1)[:total]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes in place; one that saw no text of its own counts as zero."""
    if world()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
