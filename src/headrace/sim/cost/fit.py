"""From measured steps to the rates of the machine they ran on, and how far off those are.

In: steps, as rows and seconds. Out: `Rates`, least squares of the relative error. It must not know how steps
are measured (`calibration.py`).

The roofline is linear in what is sought (seconds for an operation, for a byte, for a step, for a row) once it
is known which side of each `max` a step is on. So: guess, fit, look again, until no step changes sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.sim.cost.models import ModelShape
from headrace.sim.cost.step import Rates, Row, StepCost

ROUNDS = 50
_FIRST_GUESS = (1e-11, 1e-11, 1e-10, 1e-10, 1e-4, 1e-5)
LEAST_S_PER_UNIT = 1e-18
"""Of an operation or a byte, where steps show no time for it at all."""

_UNITS = 4
"""Of the six unknowns: seconds for an operation of matrices, of attention, for a byte of weights, of KV."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step that was run, alone on the machine as far as one could."""

    rows: tuple[Row, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class FitError:
    """How far predictions are from measurements: |predicted / measured - 1|."""

    steps: int
    mean: float
    median: float
    most: float


def fit(shape: ModelShape, steps: Sequence[MeasuredStep]) -> Rates:
    """The rates under which `StepCost` is nearest to what was measured.

    Raises ValueError for fewer steps than there are unknowns, or times that are none.
    """
    if len(steps) < len(_FIRST_GUESS):
        sought = len(_FIRST_GUESS)
        raise ValueError(f"{len(steps)} steps were measured, and {sought} rates are sought; measure more")
    if any(not step.seconds > 0 for step in steps):
        raise ValueError("a measured step took no time")
    guess = np.array(_FIRST_GUESS)
    best, least = guess, np.inf
    for _ in range(ROUNDS):
        parts = np.array([_linear_in(shape, step.rows, guess) for step in steps])
        weighted = parts / np.array([[step.seconds] for step in steps])
        found = np.maximum(_least_squares(weighted), [LEAST_S_PER_UNIT] * _UNITS + [0.0, 0.0])
        rates = _rates(found)
        squares = sum(_off(StepCost(shape, rates), step) ** 2 for step in steps)
        if squares < least:
            best, least = found, squares
        if np.allclose(found, guess, rtol=1e-9, atol=0.0):
            break
        guess = found
    return _rates(best)


def errors(cost: StepCost, steps: Iterable[MeasuredStep]) -> FitError:
    """How far off a cost model is on these steps, of which there is one at least."""
    off = sorted(abs(_off(cost, step)) for step in steps)
    return FitError(len(off), sum(off) / len(off), off[len(off) // 2], off[-1])


def _off(cost: StepCost, step: MeasuredStep) -> float:
    return cost.seconds(step.rows) / step.seconds - 1.0


def _linear_in(shape: ModelShape, rows: Sequence[Row], guess: NDArray[np.float64]) -> list[float]:
    """What each of the six unknowns is multiplied with, on the sides of the roofs where `guess` is."""
    operation, attended, byte, kv_byte = guess[:_UNITS]
    tokens = sum(new for new, _ in rows)
    linear_flops = attention_flops = moved = kv_moved = 0.0
    for weights, positions in ((shape.layer_weights, tokens), (shape.head_weights, len(rows))):
        flops, size = 2.0 * weights * positions, weights * shape.weight_bytes_each
        if flops * operation > size * byte:
            linear_flops += flops
        else:
            moved += size
    for new, context in rows:
        flops = new * (context + 0.5 * (new + 1)) * shape.pair_flops
        size = (context + 2 * new) * shape.kv_bytes
        if flops * attended > size * kv_byte:
            attention_flops += flops
        else:
            kv_moved += size
    return [linear_flops, attention_flops, moved, kv_moved, 1.0, float(len(rows))]


def _least_squares(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """x of least |parts · x - 1| without a negative component: the best over all sets that may be above 0."""
    steps, unknowns = parts.shape
    scale = np.abs(parts).max(axis=0)
    seen = [i for i in range(unknowns) if scale[i] > 0]  # others are multiplied with nothing
    best, least = np.zeros(unknowns), np.inf
    for size in range(1, len(seen) + 1):
        for chosen in itertools.combinations(seen, size):
            some = list(chosen)
            x, *_ = np.linalg.lstsq(parts[:, some] / scale[some], np.ones(steps), rcond=None)
            if (x < 0).any():
                continue
            residual = float(np.sum((parts[:, some] / scale[some] @ x - 1.0) ** 2))
            if residual < least:
                best, least = np.zeros(unknowns), residual
                best[some] = x / scale[some]
    return best


def _rates(found: NDArray[np.float64]) -> Rates:
    operation, attended, byte, kv_byte, step_s, row_s = map(float, found)
    return Rates(
        linear_flops_per_s=1.0 / operation,
        attention_flops_per_s=1.0 / attended,
        bytes_per_s=1.0 / byte,
        kv_bytes_per_s=1.0 / kv_byte,
        step_s=step_s,
        row_s=row_s,
    )
