"""A cluster under faults: whatever breaks, every sample ends once, says nothing wrong, and nothing is left.

Replay a seed: headrace simulate --seeds 7
"""

from __future__ import annotations

import os

import pytest

from headrace.config.engine import usable_cores
from headrace.sim.search import Scope, search

SEEDS = 100 * int(os.environ.get("HEADRACE_EXAMPLES", "1"))


@pytest.mark.timeout(60 + 3 * SEEDS)
def test_whatever_breaks_nothing_is_wrong_lost_or_left() -> None:
    verdict = search(range(SEEDS), Scope(), jobs=usable_cores())
    assert verdict.seeds == SEEDS
    assert not verdict.failures, "\n".join(f"seed {f.seed}: {f.error}" for f in verdict.failures)
    assert min(verdict.endings[how] for how in ("stop", "length", "cancelled")) > SEEDS
