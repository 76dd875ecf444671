"""The time of one step by roofline: for each part the slower of computing and moving memory.

    step = step_s + rows · row_s + linear + attention + all-reduces

    linear       2 · weights · tokens / linear FLOP/s and weight bytes / bytes/s: the longer of the two, and
                 what does not overlap of the shorter; the output projection multiplies one position for each
                 row
    attention    for each row max(pairs of query and visible position · FLOPs of a pair / attention FLOP/s,
                 KV bytes read and written / KV bytes/s)
    all-reduce   with n devices, two in each layer, of tokens · hidden elements: 2 (n - 1) / n of the bytes
                 over a device's link (the bound of any all-reduce), and a fixed latency each

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 2009, is where the idea is from. Not in it: activations in memory, norms and sampling
(they are in `row_s` and the efficiencies), overlap of parts, and tiles that are not full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.sim.cost.models import ModelShape

ACTIVATION_BYTES = 2
"""Of an element that devices add up: bfloat16, whatever the weights are."""

Row = tuple[int, int]
"""(new, context): positions computed in the step, and those before them that they see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one device of a worker really reaches. Not peaks: efficiencies are in these numbers."""

    linear_flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    """Of memory, for weights."""
    kv_bytes_per_s: float
    """Of memory, for KV blocks, which lie here and there."""
    step_s: float
    """What a step takes beside its rows: launching, planning, committing."""
    row_s: float
    """What each row takes beside its arithmetic: sampling, bookkeeping."""
    link_bytes_per_s: float = 1e18
    """Between the devices of a worker, one direction of one device; a lone one sends nothing."""
    all_reduce_s: float = 0.0
    """Latency of one all-reduce."""
    overlap: float = 1.0
    """Share of the shorter of reading weights and multiplying with them that is hidden behind the longer: 1
    is the roofline, 0 is one after the other, as on a core that waits for what it reads."""

    def __post_init__(self) -> None:
        for name in (
            *("linear_flops_per_s", "attention_flops_per_s"),
            *("bytes_per_s", "kv_bytes_per_s", "link_bytes_per_s"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("step_s", "row_s", "all_reduce_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 s, got {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be between 0 and 1, got {self.overlap}")


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the time of a step goes, in seconds."""

    overhead_s: float
    linear_s: float
    attention_s: float
    all_reduce_s: float

    @property
    def total_s(self) -> float:
        return self.overhead_s + self.linear_s + self.attention_s + self.all_reduce_s


class StepCost:
    """The cost of steps of one model on one worker of `devices` with tensor parallelism."""

    def __init__(self, shape: ModelShape, rates: Rates, devices: int = 1) -> None:
        """ValueError where the heads cannot be shared out."""
        if devices < 1 or shape.heads % devices:
            raise ValueError(f"{shape.heads} heads of {shape.name} cannot be shared out to {devices} devices")
        self.shape, self.rates, self.devices = shape, rates, devices
        linear = 2.0 / (devices * rates.linear_flops_per_s)
        self._layers_token_s = shape.layer_weights * linear
        self._head_row_s = shape.head_weights * linear
        bytes_s = 1.0 / (devices * rates.bytes_per_s)
        self._layers_read_s = shape.layer_weights * shape.weight_bytes_each * bytes_s
        self._head_read_s = shape.head_weights * shape.weight_bytes_each * bytes_s
        self._in_turn = 1.0 - rates.overlap
        self._pair_s = shape.pair_flops / (devices * rates.attention_flops_per_s)
        # Devices beyond the number of kv heads keep copies, so that each has ceil(kv_heads / devices).
        kept = -(-shape.kv_heads // devices) / shape.kv_heads
        self._position_s = shape.kv_bytes * kept / rates.kv_bytes_per_s
        wire = 2.0 * (devices - 1) / devices * shape.hidden * ACTIVATION_BYTES / rates.link_bytes_per_s
        self._reduce_token_s = 2 * shape.layers * wire
        self._reduce_s = 2 * shape.layers * rates.all_reduce_s if devices > 1 else 0.0

    def seconds(self, rows: Sequence[Row]) -> float:
        """How long a step of these rows takes; 0 for one without rows."""
        if not rows:
            return 0.0
        pair_s, position_s = self._pair_s, self._position_s
        tokens = 0
        total = self._reduce_s + self.rates.step_s + len(rows) * self.rates.row_s
        for new, context in rows:
            tokens += new
            compute = new * (context + 0.5 * (new + 1)) * pair_s
            memory = (context + 2 * new) * position_s
            total += compute if compute > memory else memory
        layers, head = tokens * self._layers_token_s, len(rows) * self._head_row_s
        total += layers if layers > self._layers_read_s else self._layers_read_s
        total += head if head > self._head_read_s else self._head_read_s
        if self._in_turn:
            total += self._in_turn * (min(layers, self._layers_read_s) + min(head, self._head_read_s))
        return total + tokens * self._reduce_token_s

    def parts(self, rows: Sequence[Row]) -> Parts:
        """What `seconds` adds up, for those who want to know why."""
        if not rows:
            return Parts(0.0, 0.0, 0.0, 0.0)
        tokens = sum(new for new, _ in rows)
        attention = sum(
            max(
                new * (context + 0.5 * (new + 1)) * self._pair_s,
                (context + 2 * new) * self._position_s,
            )
            for new, context in rows
        )
        both = (tokens * self._layers_token_s, self._layers_read_s)
        of_head = (len(rows) * self._head_row_s, self._head_read_s)
        linear = max(both) + max(of_head) + self._in_turn * (min(both) + min(of_head))
        overhead = self.rates.step_s + len(rows) * self.rates.row_s
        return Parts(overhead, linear, attention, self._reduce_s + tokens * self._reduce_token_s)

    def prefill_seconds(self, new: int, context: int, budget: int) -> float:
        """A prompt's `new` positions after `context` cached ones, alone, in chunks of `budget`."""
        done = 0
        total = 0.0
        while done < new:
            count = min(budget, new - done)
            total += self.seconds([(count, context + done)])
            done += count
        return total

    def memory_bytes(self, positions: int) -> float:
        """What each device keeps: its share of weights and embedding, and of the KV of so many positions."""
        shape = self.shape
        weights = (shape.layer_weights + 2 * shape.head_weights) * shape.weight_bytes_each / self.devices
        kept = -(-shape.kv_heads // self.devices) / shape.kv_heads
        return weights + positions * shape.kv_bytes * kept
