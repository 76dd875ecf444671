"""How fast one worker is: a step's time, fitted to the steps that it reports, and what follows from it.

In: each step's numbers, and how long sequences decoded. Out: predicted TTFT and TPOT. The model is

    step_s = base + per_token * tokens + per_held * (positions in the KV cache)

by least squares over the latest steps, older ones counting less and less. It is the linear form of the
roofline: weights read once, arithmetic per token, keys and values read per step. Times in seconds.
"""

from __future__ import annotations

import math

from headrace.protocol.messages import EngineInfo, SequenceTimes, StepStats

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
    """One worker's, for one life of its engine."""

    def __init__(self, engine: EngineInfo) -> None:
        self._budget = engine.max_num_batched_tokens
        self._rows = engine.max_num_seqs
        self._sums = [0.0] * 9
        """Of 1, t, h, tt, th, hh, s, st, sh over the steps, with t tokens, h held, s seconds."""
        self._unsettled = 0
        self._fit = (FIRST_BASE_S, FIRST_TOKEN_S, 0.0)
        self._running = 0
        self._waiting = 0
        self._held = 0
        self._prefilled = 0.0
        self._decode_s = FIRST_DECODE_S
        self._busy = 0.0
        self._busy_at_s = 0.0

    def stepped(self, stats: StepStats, now: float) -> None:
        """Take in a step, or what changed without one."""
        self._running, self._waiting, self._held = stats.running, stats.waiting, stats.held_tokens
        if not stats.rows:
            return
        self._busy = self.busy(now) + stats.step_s / BUSY_S
        self._busy_at_s = now
        self._prefilled += 0.05 * (stats.tokens - stats.sampled - self._prefilled)
        t, h, s = stats.tokens / _TOKENS, stats.held_tokens / _HELD, stats.step_s
        keep = MEMORY
        self._sums = [
            keep * old + new
            for old, new in zip(self._sums, (1.0, t, h, t * t, t * h, h * h, s, s * t, s * h), strict=True)
        ]
        self._unsettled += 1

    def ended(self, times: SequenceTimes) -> None:
        """A sequence has ended there."""
        if times.decode_s is not None:
            self._decode_s += 0.05 * (times.decode_s - self._decode_s)

    def busy(self, now: float) -> float:
        """The share of its time, lately, that it spent in steps."""
        return self._busy * math.exp(-max(0.0, now - self._busy_at_s) / BUSY_S)

    def step_s(self, tokens: float, held: float) -> float:
        """A step's time."""
        base, per_token, per_held = self._settled()
        return base + per_token * tokens + per_held * held

    @property
    def prefill_tokens_per_s(self) -> float:
        """In full steps, beside what decodes now."""
        return self._room / self.step_s(self._budget, self._held)

    def ttft_s(self, tokens: float, open_samples: int) -> float:
        """Until so many tokens, queued ones and a request's own, are computed, and the request has a row.

        `open_samples` there, those on their way included.
        """
        steps = math.ceil(tokens / self._room)
        beside = min(self._running, self._budget - 1)
        base, per_token, per_held = self._settled()
        computing_s = steps * (base + per_held * self._held + per_token * beside) + per_token * tokens
        over = open_samples + 1 - self._rows
        return computing_s + (over / self._rows * self._decode_s if over > 0 else 0.0)

    def tpot_s(self, context_tokens: float, ttft_s: float, open_samples: int) -> float:
        """A step's time once a request decodes there after `ttft_s`: some that run now will have ended by
        then, and those that wait now will run."""
        staying = self._running * math.exp(-ttft_s / max(self._decode_s, 1e-3))
        coming = max(0, open_samples - self._running)
        others = min(float(self._rows - 1), staying + coming)
        each = self._held / self._running if self._running else context_tokens
        return self.step_s(others + 1 + self._prefilled, others * each + context_tokens)

    @property
    def _room(self) -> int:
        """Tokens of a step that are left for prompts."""
        return max(1, self._budget - self._running)

    def _settled(self) -> tuple[float, float, float]:
        if self._unsettled >= SETTLE_STEPS or (self._unsettled and self._sums[0] < SETTLE_STEPS):
            self._unsettled = 0
            self._fit = _solve(self._sums)
        return self._fit


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
