"""Which layers keep their keys and values in the same KV pages.

Layers of one kind (full attention, or one sliding window) need the same pages for the same time, so
they share block tables. Groups of equal layer counts have pages of equal size, so one pool of pages
serves them all: a page freed by a window that has moved on can hold keys of full attention next. The
count is therefore the greatest common divisor over the kinds, and a kind with more layers has several groups.

No torch here: the engine plans with these groups.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import gcd

from headrace.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables.

    window: as in `LayerKind`; None is full attention
    layers: indices into the model's layers, ascending; layers[j] is layer j of the group's pages
    """

    window: int | None
    layers: tuple[int, ...]


def kv_groups(config: ModelConfig) -> tuple[KVGroup, ...]:
    """Split the model's layers into groups of equal size; full attention first, then by window."""
    layers_of: dict[int | None, list[int]] = defaultdict(list)
    for index, kind in enumerate(config.layer_kinds):
        layers_of[kind.window].append(index)
    size = gcd(*(len(layers) for layers in layers_of.values()))
    windows = sorted(layers_of, key=lambda window: -1 if window is None else window)
    return tuple(
        KVGroup(window, tuple(layers_of[window][start : start + size]))
        for window in windows
        for start in range(0, len(layers_of[window]), size)
    )
