"""From measured steps to the rates of the machine they ran on, and how far off those are.

In: steps, as rows and seconds, and the rate at which memory is read. Out: `Rates`, least squares of the
relative error. It must not know how any of it is measured (`calibration.py`).

The rate of memory is not fitted: the steps of one model all read the same weights, so nothing in them tells
the time of reading from that of a step. With an overlap given, the model is linear in what is sought (seconds
for an operation, for a byte of KV blocks, for a step, for a row) once it is known which of reading and
multiplying is longer in a step. So: guess, fit, look again, until no step changes sides; and the overlap that
leaves least is taken.
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
_FIRST_GUESS = (1e-11, 1e-11, 1e-10, 1e-4, 1e-5)
OVERLAPS = tuple(twentieths / 20 for twentieths in range(21))
LEAST_S_PER_UNIT = 1e-18
"""Of an operation or a byte, where steps show no time for it at all."""

_UNITS = 3
"""Of the five unknowns: seconds for an operation of matrices, of attention, for a byte of KV blocks."""


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


def fit(shape: ModelShape, steps: Sequence[MeasuredStep], bytes_per_s: float) -> Rates:
    """The rates under which `StepCost` is nearest to what was measured, weights being read at `bytes_per_s`.

    Raises ValueError for fewer steps than there are unknowns, or times that are none.
    """
    if not 0 < bytes_per_s < np.inf:
        raise ValueError(f"memory is read at {bytes_per_s} bytes a second")
    if len(steps) < len(_FIRST_GUESS):
        sought = len(_FIRST_GUESS)
        raise ValueError(f"{len(steps)} steps were measured, and {sought} rates are sought; measure more")
    if any(not step.seconds > 0 for step in steps):
        raise ValueError("a measured step took no time")
    found = [_fit(shape, steps, bytes_per_s, overlap) for overlap in OVERLAPS]
    return min(found, key=lambda rates: _squares(StepCost(shape, rates), steps))


def _fit(shape: ModelShape, steps: Sequence[MeasuredStep], bytes_per_s: float, overlap: float) -> Rates:
    guess, seconds = np.array(_FIRST_GUESS), np.array([step.seconds for step in steps])
    best, least = _rates(guess, bytes_per_s, overlap), np.inf
    for _ in range(ROUNDS):
        split = [_linear_in(shape, step.rows, guess, 1.0 / bytes_per_s, 1.0 - overlap) for step in steps]
        read_s = np.array([moved for moved, _ in split]) / bytes_per_s
        parts = np.array([sought for _, sought in split]) / seconds[:, None]
        found = np.maximum(
            _least_squares(parts, 1.0 - read_s / seconds), [LEAST_S_PER_UNIT] * _UNITS + [0.0, 0.0]
        )
        rates = _rates(found, bytes_per_s, overlap)
        if (squares := _squares(StepCost(shape, rates), steps)) < least:
            best, least = rates, squares
        if np.allclose(found, guess, rtol=1e-9, atol=0.0):
            break
        guess = found
    return best


def errors(cost: StepCost, steps: Iterable[MeasuredStep]) -> FitError:
    """How far off a cost model is on these steps, of which there is one at least."""
    off = sorted(abs(_off(cost, step)) for step in steps)
    return FitError(len(off), sum(off) / len(off), off[len(off) // 2], off[-1])


def _squares(cost: StepCost, steps: Iterable[MeasuredStep]) -> float:
    return sum(_off(cost, step) ** 2 for step in steps)


def _off(cost: StepCost, step: MeasuredStep) -> float:
    return cost.seconds(step.rows) / step.seconds - 1.0


def _linear_in(
    shape: ModelShape, rows: Sequence[Row], guess: NDArray[np.float64], byte: float, in_turn: float
) -> tuple[float, list[float]]:
    """The bytes of weights that a step waits for, and what each of the five unknowns is multiplied with, on
    the sides of the roofs where `guess` is. `byte` is the time of a byte of weights, `in_turn` the share of
    the shorter of reading and multiplying that is not hidden."""
    operation, attended, kv_byte = guess[:_UNITS]
    tokens = sum(new for new, _ in rows)
    linear_flops = attention_flops = moved = kv_moved = 0.0
    for weights, positions in ((shape.layer_weights, tokens), (shape.head_weights, len(rows))):
        flops, size = 2.0 * weights * positions, weights * shape.weight_bytes_each
        computes = flops * operation > size * byte
        linear_flops += flops * (1.0 if computes else in_turn)
        moved += size * (in_turn if computes else 1.0)
    for new, context in rows:
        flops = new * (context + 0.5 * (new + 1)) * shape.pair_flops
        size = (context + 2 * new) * shape.kv_bytes
        if flops * attended > size * kv_byte:
            attention_flops += flops
        else:
            kv_moved += size
    return moved, [linear_flops, attention_flops, kv_moved, 1.0, float(len(rows))]


def _least_squares(parts: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """x of least |parts · x - wanted| without a negative component: the best over all sets that may be above
    0."""
    unknowns = parts.shape[1]
    scale = np.abs(parts).max(axis=0)
    seen = [i for i in range(unknowns) if scale[i] > 0]  # others are multiplied with nothing
    best, least = np.zeros(unknowns), float(np.sum(wanted**2))
    for size in range(1, len(seen) + 1):
        for chosen in itertools.combinations(seen, size):
            some = list(chosen)
            x, *_ = np.linalg.lstsq(parts[:, some] / scale[some], wanted, rcond=None)
            if (x < 0).any():
                continue
            residual = float(np.sum((parts[:, some] / scale[some] @ x - wanted) ** 2))
            if residual < least:
                best, least = np.zeros(unknowns), residual
                best[some] = x / scale[some]
    return best


def _rates(found: NDArray[np.float64], bytes_per_s: float, overlap: float) -> Rates:
    operation, attended, kv_byte, step_s, row_s = map(float, found)
    return Rates(
        linear_flops_per_s=1.0 / operation,
        attention_flops_per_s=1.0 / attended,
        bytes_per_s=bytes_per_s,
        kv_bytes_per_s=1.0 / kv_byte,
        step_s=step_s,
        row_s=row_s,
        overlap=overlap,
    )
