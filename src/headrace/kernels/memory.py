"""Reading memory as fast as the kernels can: what a roofline's memory term is measured with.

In: how many bytes. Out: a call that reads them all once, with the threads that the kernels were made with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from headrace.kernels.huge_pages import huge_zeros


def memory_reader(size: int) -> Callable[[], int]:
    """Each call reads so many bytes, in huge pages where there are any, and returns how many."""
    memory = huge_zeros(size)
    memory.fill_(1)  # what was never written is one page of zeros
    if importlib.util.find_spec("headrace._native") is None:
        words = memory[: size // 8 * 8].view(torch.int64)

        def summed() -> int:
            words.sum()
            return size

        return summed
    from headrace import _native

    def read() -> int:
        _native.read(memory.data_ptr(), size)
        return size

    return read
