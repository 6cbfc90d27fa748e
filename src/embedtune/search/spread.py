"""Bulk embedding by many machines: Ray's workers, each with a model of its own, embed blocks; the order stays.

It is a stream like any other: texts in, `Embedded` blocks out, in the order of the texts. So what `bulk` promises of
files, of resuming and of memory holds here too. A block's vectors depend on nothing but its texts, so it does not
matter which worker made them, nor that a worker died and another one made them again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from embedtune.encoder.embed import WINDOW, Embedded
from embedtune.encoder.embedder import Precision
from embedtune.encoder.encode import HOSTED, Encoder, Role, identity, open_encoder, stream
from embedtune.encoder.shapes import bound_memory
from embedtune.errors import UserError

FIX = "pip install 'embedtune[ray]'"
AHEAD = 2  # blocks that a worker has, or that wait for it
DEATHS = 3  # of one worker, and runs of one block, before the whole is given up

Note = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """What each worker opens; `identity` is what it must find there."""

    name: str
    identity: str
    role: Role = "text"
    prompt: str | None = None
    pooling: str | None = None
    precision: Precision = "fp32"


class Worker:
    """A process with a model, which is opened by the first call: so a worker that was started anew has one too."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.encoder: Encoder | None = None

    def ready(self) -> int:
        """Open the model; returns the process id."""
        self._opened()
        return os.getpid()

    def embed(self, texts: list[str]) -> Embedded:
        """The vectors of a block."""
        (found,) = stream(self._opened(), texts, self.model.role, self.model.prompt)
        return found

    def _opened(self) -> Encoder:
        if self.encoder is None:
            model = self.model
            if identity(model.name) != model.identity:
                what, fix = "is another model on a worker's machine", "put the same files there, under the same name"
                raise UserError(what, where=model.name, fix=fix)
            bound_memory()
            self.encoder = open_encoder(model.name, precision=model.precision, pooling=model.pooling)
        return self.encoder


def ray_package() -> Any:
    """The package ray; a UserError where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError as error:
        raise UserError("needs another package, ray", where="--engine ray", fix=FIX) from error
    return ray


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray: the one that is open already, else the one of RAY_ADDRESS, else one of this machine until the end."""
    ray = ray_package()
    opened = not ray.is_initialized()
    if opened:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise UserError(f"Ray cannot be reached or started: {str(error).splitlines()[0]}", where=where) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, with another exit code
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()


def check(name: str, workers: int | None) -> None:
    """A UserError, before any work, where the package is missing, or for what workers cannot do."""
    ray_package()
    if name.startswith(HOSTED):
        raise UserError("is computed elsewhere already", where=name, fix="leave out --engine ray")
    if workers is not None and workers < 1:
        raise UserError(f"must be at least 1, not {workers}", where="--workers")


def start(ray: Any, model: Model, workers: int | None, note: Note) -> list[Any]:
    """The workers (derived: one for each GPU, else for each CPU); each has its model open when this returns."""
    there = ray.cluster_resources()
    unit, key = ("num_gpus", "GPU") if there.get("GPU", 0) >= 1 else ("num_cpus", "CPU")
    most = int(there.get(key, 0))
    many = workers or most
    if not 1 <= many <= most:
        raise UserError(f"{many} workers need {many} {key}s, the cluster has {most}", where="--workers",
                        fix=f"--workers {most}" if most else "give the cluster a machine")  # fmt: skip
    needs: dict[str, Any] = {unit: 1, "max_restarts": DEATHS, "max_task_retries": DEATHS}
    made = [ray.remote(**needs)(Worker).remote(model) for _ in range(many)]
    for answer in [worker.ready.remote().future() for worker in made]:
        _got(ray, answer)
    note(f"{many} workers of Ray, one {key} each")
    return made


def spread(ray: Any, workers: list[Any], texts: Iterable[str]) -> Iterator[Embedded]:
    """The vectors of a stream of texts, one `Embedded` per WINDOW texts, in their order.

    At most AHEAD blocks a worker are on their way; the next one goes to the worker that has the fewest. Raises
    UserError where a worker dies again and again.
    """
    rest = iter(texts)
    blocks = iter(lambda: list(islice(rest, WINDOW)), [])
    ahead: deque[tuple[Any, int]] = deque()  # answers to come, the oldest first, and whose they are
    while True:
        for block in islice(blocks, AHEAD * len(workers) - len(ahead)):
            loads = Counter(number for answer, number in ahead if not answer.done())
            lightest = min(range(len(workers)), key=lambda number: loads[number])
            ahead.append((workers[lightest].embed.remote(block).future(), lightest))
        if not ahead:
            return
        yield _got(ray, ahead.popleft()[0])


def _got(ray: Any, answer: Any) -> Any:
    """What an answer holds, waited for where a signal can end it; what happened to a worker is a UserError."""
    try:
        return answer.result()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        what = f"a worker died more than {DEATHS} times: {str(error).strip().splitlines()[0]}"
        fix = "look at its machine's memory; --resume goes on from what is finished"
        raise UserError(what, where="--engine ray", fix=fix) from error
