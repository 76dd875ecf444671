"""Whether engines can have the memory that they are asked to take, seen before any of it is taken.

In: a model's tensors, an engine's options, how many engines. Out: nothing, or why not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from headrace.config import EngineOptions, format_size
from headrace.world.machine import available_memory


def check_memory(shapes: Iterable[Sequence[int]], options: EngineOptions, engines: int = 1) -> None:
    """Raise MemoryError when weights of these shapes and KV caches of so many engines cannot all fit.

    The kernel would kill one of them later, and say nothing.
    """
    element_bytes = 4 if options.dtype == "float32" else 2
    weights = sum(math.prod(shape) for shape in shapes) * element_bytes
    available = available_memory()
    if available is None or engines * (weights + options.kv_cache_memory) <= available:
        return
    who = f"each of {engines} workers" if engines > 1 else "the engine"
    fit = available // (weights + options.kv_cache_memory)
    remedy = f"start {fit}, which would fit, lower it" if engines > 1 and fit else "lower it"
    raise MemoryError(
        f"{who} needs {format_size(weights)} for weights and --kv-cache-memory is "
        f"{format_size(options.kv_cache_memory)}, and {format_size(available)} are available; "
        f"{remedy}, or free memory"
    )
