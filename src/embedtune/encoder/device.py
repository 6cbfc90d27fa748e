"""What models run on: which device, what it can multiply, and how much memory it has left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware (on a CPU: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def fast_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """The faster arithmetic: bf16 where this device has it in hardware."""
    return "bf16" if has_bf16(device) else "fp32"


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Ordered:
    """How many ask for a fixed order of sums at the moment, and how it was before the first of them."""

    lock = threading.Lock()
    holders = 0
    before: tuple[bool, bool, bool] = (False, False, True)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """While this holds, the same work gives the same bits on a GPU, as it does on a CPU anyway.

    Sums over rows that come in no order (of gathered vectors, in the backward pass of attention) are then made in a
    fixed one. torch knows one setting for all threads: the last to leave restores what the first one found.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch asks for it
    settings: Any = torch.utils.deterministic
    with _Ordered.lock:
        if not _Ordered.holders:
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            filled = settings.fill_uninitialized_memory
            _Ordered.before = torch.are_deterministic_algorithms_enabled(), warn, filled
            torch.use_deterministic_algorithms(True)
            settings.fill_uninitialized_memory = False  # memory that we take is memory that we write
        _Ordered.holders += 1
    try:
        yield
    finally:
        with _Ordered.lock:
            _Ordered.holders -= 1
            if not _Ordered.holders:
                on, warn, settings.fill_uninitialized_memory = _Ordered.before
                torch.use_deterministic_algorithms(on, warn_only=warn)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a container's own limit; "max" where it has none
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits, default=4 * 2**30))
