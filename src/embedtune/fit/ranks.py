"""Several processes as one run: each takes its share of every batch, gradients are averaged, the first one writes.

torchrun starts them. Rows, masks and dropout are functions of (seed, step, row), so each process takes every N-th row
of a batch without asking: N processes do what one does, to the rounding of the sums. What is decided is decided by the
first (`first`), or is arithmetic on what all have (`most`, `mean_gradients`), so it is the same everywhere.

All processes call these functions in the same order; with one process they do nothing. Weights and vectors travel on
the model's device, everything else as JSON and numbers on the CPU. Torch is imported late: the command line asks here
too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from embedtune.errors import Parted, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
# The others wait while the first one scores. A process that ends is noticed at once, so this may be long.
PATIENCE = timedelta(hours=12)
START = timedelta(minutes=5)  # but whoever ends before they have met is noticed by nobody


def launched() -> tuple[int, int]:
    """(this process's number, how many there are) as torchrun says it in the environment; (0, 1) without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), count) if count > 1 and "RANK" in os.environ else (0, 1)


def neighbours() -> int:
    """Processes of this run on this machine: they share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched()[1] > 1 else 1


def world() -> tuple[int, int]:
    """(this process's number, how many there are); (0, 1) outside of `started`."""
    import torch.distributed as dist

    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


@contextmanager
def started() -> Iterator[None]:
    """Inside the block the processes that torchrun launched are one run; nothing where there is one, or inside another.

    gloo on the CPU, nccl between GPUs, of which each process takes that of its local number. A UserError that only
    this process has ends the others too.
    """
    if launched()[1] == 1 or world()[1] > 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _parting():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=START)
    try:
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(PATIENCE)
        with _told():
            yield
    finally:
        dist.destroy_process_group()


def together(work: Callable[[], T]) -> T:
    """What `work` gives on each process, once it is done on all; a UserError on one is raised on all."""
    with _told():
        result = work()
    _exchange(None, None)
    return result


def first(work: Callable[[], Any]) -> Any:
    """What `work` gives on the first process, which alone does it, on all of them: a value that JSON can hold.

    A UserError is raised on all.
    """
    with _told():
        value = work() if world()[0] == 0 else None
    return _exchange(None, value)


def alone(error: UserError) -> Exception:
    """`error` as one process raises it where it cannot tell the others any more, since they wait for its numbers."""
    rank, count = world()
    return error if count == 1 else Parted(f"process {rank} of {count}: {error}")


def most(values: Sequence[float]) -> list[float]:
    """The largest of each value over all processes."""
    if world()[1] == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    found = torch.tensor(values, dtype=torch.float64)
    with _parting():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def same_weights(module: nn.Module) -> None:
    """Give every process the first one's parameters, bit for bit."""
    if world()[1] == 1:
        return
    import torch.distributed as dist

    with _parting():
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)


def gather(vectors: Tensor, total: int) -> Tensor:
    """Vectors (m, D) of every process's share into (total, D), where process r holds the rows r, r + N, r + 2N, ..."""
    count = world()[1]
    if count == 1:
        return vectors
    import torch
    import torch.distributed as dist

    most_rows = -(-total // count)
    mine = vectors.new_zeros(most_rows, vectors.shape[1])
    mine[: len(vectors)] = vectors
    parts = [torch.empty_like(mine) for _ in range(count)]
    with _parting():
        dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).reshape(most_rows * count, -1)[:total]


def mean_gradients(
    parameters: Sequence[nn.Parameter], weight: float, loss: float, tokens: float
) -> tuple[float, float]:
    """Replace every gradient by the mean of all processes, each with its `weight`; gives that of `loss`, all `tokens`.

    With the mean over its own share from each, and what it was divided by as the weight, this is the mean over the
    whole batch, and no process need know more of a batch than its share. One all_reduce of one flat float32 buffer.
    Behind the gradients it holds who has one at all: a parameter that none of the processes has used keeps None, as
    with one process, and is neither moved nor decayed.
    """
    if world()[1] == 1:
        return loss, tokens
    import torch
    import torch.distributed as dist

    used = [float(parameter.grad is not None) for parameter in parameters]
    about = torch.tensor([*used, weight, weight * loss, tokens], device=parameters[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.reshape(-1) for part in parts), about])
    gradients = flat[: -len(about)].mul_(weight)
    with _parting():
        dist.all_reduce(flat)
    *users, weight, loss, tokens = flat[-len(about) :].tolist()
    whole = weight or 1.0  # a batch with nothing to learn from
    means = gradients.div_(whole).split([parameter.numel() for parameter in parameters])
    for parameter, mean, count in zip(parameters, means, users, strict=True):
        parameter.grad = mean.view_as(parameter) if count else None
    return loss / whole, tokens


@contextmanager
def _told() -> Iterator[None]:
    """The others, who wait in `_exchange`, are told of a UserError in the block; all of them then have it."""
    try:
        yield
    except UserError as error:
        if world()[1] == 1 or error.shared:
            raise
        _exchange(error, None)


def _exchange(error: UserError | None, value: Any) -> Any:
    """The value of the first process; where one has a UserError, that of the lowest is raised on all instead."""
    if world()[1] == 1:
        return value
    import torch
    import torch.distributed as dist

    said: dict[str, Any] = {"value": value}
    if error is not None:
        said = {"error": {"what": error.what, "where": error.where, "fix": error.fix, "details": error.details}}
    words, count = json.dumps(said).encode(), world()[1]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    with _parting():
        dist.all_gather(sizes, torch.tensor([len(words)]))
        mine = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        mine[: len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        heard = [torch.zeros_like(mine) for _ in range(count)]
        dist.all_gather(heard, mine)
    messages = [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(heard, sizes, strict=True)]
    for message in messages:
        if "error" in message:
            raise UserError(**message["error"], shared=True) from error
    return messages[0]["value"]


@contextmanager
def _parting() -> Iterator[None]:
    """What gloo and nccl raise when the other side is gone, as an error of ours that says so."""
    try:
        yield
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        rank, count = launched()
        reason = (str(error).strip().splitlines() or [""])[-1][-200:]
        raise Parted(
            f"process {rank} of {count}: cannot reach the others any more; one of them has ended ({reason})\n"
            "  if training had begun, continue with the same command, --resume"
        ) from error
