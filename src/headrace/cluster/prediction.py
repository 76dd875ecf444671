"""What a request may expect at each of many workers: TTFT and TPOT, from their paces and loads.

In: a table of facts, whose fits are `pace.py`'s. Out: a column of seconds.
"""

from __future__ import annotations

import math

import numpy as np

from headrace.cluster.facts import Column, Fact, Table
from headrace.cluster.pace import BUSY_S
from headrace.cluster.waiting import Ahead


def step_s(facts: Table, tokens: Column | float, held: Column | float) -> Column:
    """A step's time at each worker."""
    seconds: Column = (
        facts[:, Fact.BASE_S] + facts[:, Fact.PER_TOKEN_S] * tokens + facts[:, Fact.PER_HELD_S] * held
    )
    return seconds


def prefill_room(facts: Table) -> Column:
    """Tokens of a step that are left for prompts."""
    return np.maximum(facts[:, Fact.BUDGET] - facts[:, Fact.RUNNING], 1.0)


def prefill_tokens_per_s(facts: Table) -> Column:
    """In full steps, beside what decodes now."""
    return prefill_room(facts) / np.maximum(step_s(facts, facts[:, Fact.BUDGET], facts[:, Fact.HELD]), 1e-9)


def computing_s(facts: Table, tokens: Column) -> Column:
    """Until so many prompt tokens are computed, beside what decodes now."""
    steps = np.ceil(tokens / prefill_room(facts))
    running = np.minimum(facts[:, Fact.RUNNING], facts[:, Fact.BUDGET] - 1)
    found: Column = steps * step_s(facts, running, facts[:, Fact.HELD]) + facts[:, Fact.PER_TOKEN_S] * tokens
    return found


def ttft_s(facts: Table, tokens: Column) -> Column:
    """Until so many tokens, queued ones and a request's own, are computed, and the request has a row."""
    over = np.maximum(facts[:, Fact.OPEN_SAMPLES] + 1 - facts[:, Fact.ROWS], 0.0)
    waiting_s: Column = over / facts[:, Fact.ROWS] * facts[:, Fact.DECODE_S]
    return computing_s(facts, tokens) + waiting_s


def tpot_s(facts: Table, context_tokens: float, after_s: Column, samples: float = 1) -> Column:
    """A step's time once so many samples of a request decode there after `after_s`: some that run now will
    have ended by then, and of those that wait now some will run.

    Sequences last DECODE_S on average, exponentially, and those that come do so evenly until then.
    """
    running, rows = facts[:, Fact.RUNNING], facts[:, Fact.ROWS]
    own = np.minimum(samples, rows)
    lives = np.maximum(after_s / np.maximum(facts[:, Fact.DECODE_S], 1e-3), 1e-9)
    staying = running * np.exp(-lives)
    coming = np.maximum(facts[:, Fact.OPEN_SAMPLES] - running, 0.0) * -np.expm1(-lives) / lives
    others = np.minimum(rows - own, staying + coming)
    each = _held_by_one(facts, context_tokens)
    return step_s(facts, others + own + facts[:, Fact.PREFILLED], others * each + own * context_tokens)


def row_s(facts: Table, context_tokens: float) -> Column:
    """What one sequence that decodes adds to a step."""
    seconds: Column = facts[:, Fact.PER_TOKEN_S] + facts[:, Fact.PER_HELD_S] * _held_by_one(
        facts, context_tokens
    )
    return seconds


def _held_by_one(facts: Table, context_tokens: float) -> Column:
    running = facts[:, Fact.RUNNING]
    return np.where(running > 0, facts[:, Fact.HELD] / np.maximum(running, 1.0), context_tokens)


def busy(facts: Table, now: float) -> Column:
    """Share of their time, lately, that they spent in steps."""
    share: Column = facts[:, Fact.BUSY] * np.exp(-np.maximum(now - facts[:, Fact.BUSY_AT_S], 0.0) / BUSY_S)
    return share


def decode_load(facts: Table) -> Column:
    """Share of rows, or of KV blocks, that are in use, whichever is scarcer; above 1 something waits."""
    return np.maximum(facts[:, Fact.OPEN_SAMPLES] / facts[:, Fact.ROWS], facts[:, Fact.HELD_SHARE])


def computed_in_s(computing: Table, tokens: float) -> float:
    """Until some workers have computed so many prompt tokens together."""
    return tokens / max(float(prefill_tokens_per_s(computing).sum()), 1e-9) if tokens else 0.0


def rows_in_s(homes: Table, samples: float) -> float:
    """Until so many sequences have left the rows of these workers, all of which are in use."""
    if samples <= 0:
        return 0.0
    return samples / max(float((homes[:, Fact.ROWS] / np.maximum(homes[:, Fact.DECODE_S], 1e-3)).sum()), 1e-9)


MOST_STRETCH = 20.0
"""What is overtaken by as much as there is time for waits for the end of it, whenever that is."""
SURE = 0.5
"""Standard deviations of a wait's length, for what will overtake it, that are counted in: about seven waits
of ten are no longer then. By the mean alone half of those let in just below a limit would miss it."""


def overtaken_s(computing: Table, wait_s: float, ahead: Ahead) -> float:
    """How long a wait is when prompts go before it that are not there yet: those that come meanwhile, and
    while these are computed, until there is nothing before it. A prompt that is begun is not overtaken.

    Its mean is as if the workers had the rest of their time for it (Cobham, "Priority assignment in waiting
    line problems", 1954); its variance is that of a busy period that begins with so much work (Conway,
    Maxwell and Miller, "Theory of Scheduling", 1967, chapter 8), with prompts that come at random, as long as
    they were lately.
    """
    if not ahead.overtaking_per_s:
        return wait_s
    per_s = max(float(prefill_tokens_per_s(computing).sum()), 1e-9)
    left = max(1.0 - ahead.overtaking_per_s / per_s, 1.0 / MOST_STRETCH)
    each_s = ahead.overtaking_per_s / max(ahead.joining_per_s, 1e-9) / per_s
    return wait_s / left + SURE * math.sqrt(wait_s * (1.0 - left) * each_s / left**3)


def joined(homes: Table, per_s: float, there: int) -> Table:
    """These workers once there are as many of the more urgent requests as will be at a time, if so many come
    in a second; so many are there now."""
    if not per_s:
        return homes
    found = homes.copy()
    missing = max(0.0, per_s * float(homes[:, Fact.DECODE_S].mean()) - there) / len(homes)
    found[:, Fact.OPEN_SAMPLES] += missing
    return found
