"""How fast one worker is: a step's time, fitted to the steps that it reports, and what follows from it.

In: each step's numbers, and how long sequences decoded. Out: coefficients, among the worker's facts, from
which `prediction.py` predicts. The model is

    step_s = base + per_token * tokens + per_held * (positions in the KV cache)

by least squares over the latest steps, older ones counting less and less. It is the linear form of the
roofline: weights read once, arithmetic per token, keys and values read per step. Times in seconds.
"""

from __future__ import annotations

import math

from headrace.cluster.facts import Fact, Row
from headrace.protocol.messages import SequenceTimes, StepStats

MEMORY = 0.995
"""What a step's weight is multiplied by with each later one: about the last 200 count."""
SETTLE_STEPS = 8
"""Steps between two fits."""
BUSY_S = 10.0
"""Over about so long the share of busy time is told."""

FIRST_BASE_S = 0.01
FIRST_TOKEN_S = 1e-4
"""What is taken for granted of a worker that has not run a step."""
FIRST_DECODE_S = 5.0
"""How long a sequence decodes, before one has."""

_TOKENS, _HELD = 1e3, 1e5  # scales that keep the equations well conditioned
_RIDGE = 1e-3


class Pace:
    """One worker's, for one life of its engine; what it finds is in the worker's row of facts."""

    def __init__(self, facts: Row) -> None:
        self._facts = facts
        self._sums = [0.0] * 9
        """Of 1, t, h, tt, th, hh, s, st, sh over the steps, with t tokens, h held, s seconds."""
        self._unsettled = 0
        self._steps = 0
        self._answers = 1
        self._tell((FIRST_BASE_S, FIRST_TOKEN_S, 0.0))
        facts[Fact.DECODE_S] = FIRST_DECODE_S

    def keep_facts_in(self, row: Row) -> None:
        """From now on the worker's facts are in this row."""
        self._facts = row

    def stepped(self, stats: StepStats, now: float) -> None:
        """Take in a step."""
        if not stats.rows:
            return
        facts = self._facts
        faded = math.exp(-max(0.0, now - float(facts[Fact.BUSY_AT_S])) / BUSY_S)
        facts[Fact.BUSY] = facts[Fact.BUSY] * faded + stats.step_s / BUSY_S
        facts[Fact.BUSY_AT_S] = now
        facts[Fact.PREFILLED] += 0.05 * (stats.tokens - stats.sampled - facts[Fact.PREFILLED])
        t, h, s = stats.tokens / _TOKENS, stats.held_tokens / _HELD, stats.step_s
        new = (1.0, t, h, t * t, t * h, h * h, s, s * t, s * h)
        self._sums = [MEMORY * old + one for old, one in zip(self._sums, new, strict=True)]
        self._steps += 1
        self._unsettled += 1
        if self._unsettled >= SETTLE_STEPS or self._steps < SETTLE_STEPS:
            self._unsettled = 0
            self._tell(_solve(self._sums))

    def ended(self, times: SequenceTimes) -> None:
        """A sequence has ended there."""
        if times.decode_s is not None:
            self._answers = min(self._answers + 1, 20)  # the guess counts as the first
            self._facts[Fact.DECODE_S] += (times.decode_s - self._facts[Fact.DECODE_S]) / self._answers

    def _tell(self, fit: tuple[float, float, float]) -> None:
        self._facts[Fact.BASE_S : Fact.PER_HELD_S + 1] = fit


def _solve(sums: list[float]) -> tuple[float, float, float]:
    """Least squares with what is expected of a new worker as a weak prior; no coefficient is negative."""
    n, t, h, tt, th, hh, s, st, sh = sums
    prior = (FIRST_BASE_S, FIRST_TOKEN_S * _TOKENS, 0.0)
    n, tt, hh = n + _RIDGE, tt + _RIDGE, hh + _RIDGE
    s, st = s + _RIDGE * prior[0], st + _RIDGE * prior[1]
    free = [True, True, True]
    rows = ((n, t, h, s), (t, tt, th, st), (h, th, hh, sh))
    while True:
        found = _eliminate(rows, free)
        worst = min(range(3), key=lambda i: found[i])
        if found[worst] >= 0.0:
            return found[0], found[1] / _TOKENS, found[2] / _HELD
        free[worst] = False


def _eliminate(rows: tuple[tuple[float, ...], ...], free: list[bool]) -> list[float]:
    """Solve the normal equations for the free coefficients; the others are 0."""
    which = [i for i in range(3) if free[i]]
    matrix = [[rows[i][j] for j in which] + [rows[i][3]] for i in which]
    for k, pivot_row in enumerate(matrix):
        pivot = pivot_row[k]
        for other in matrix[k + 1 :]:
            factor = other[k] / pivot
            for j in range(k, len(other)):
                other[j] -= factor * pivot_row[j]
    found = [0.0, 0.0, 0.0]
    for k in reversed(range(len(which))):
        known = sum(matrix[k][j] * found[which[j]] for j in range(k + 1, len(which)))
        found[which[k]] = (matrix[k][-1] - known) / matrix[k][k]
    return found
