"""What this machine can do at most, measured as the benchmarks measure everything else."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from headrace import _native
from headrace.kernels.native import NativeKernels

READ_BYTES = 256 << 20
"""More than any cache holds."""


def seconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """The least over `repeats` of the mean time of a call, all calls in turn."""
    least = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        least = min(least, (time.perf_counter() - start) / len(calls))
    return least


def read_bandwidth(repeats: int) -> float:
    """Bytes per second at which all threads together read memory once, in huge pages where there are any."""
    memory = NativeKernels(dtype=torch.bfloat16).allocate_kv(READ_BYTES >> 21, 1, 1, 1024, 512)
    memory.fill_(1)
    size = memory.numel() * memory.itemsize
    return size / seconds([lambda: _native.read(memory.data_ptr(), size)], repeats)
