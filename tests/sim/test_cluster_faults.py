"""A cluster under faults: whatever breaks, every sample ends once, says nothing wrong, and nothing is left.

Replay a seed: headrace simulate --seeds 7
"""

from __future__ import annotations

import os

import pytest

from headrace.sim.life import live


@pytest.mark.parametrize("seed", range(100 * int(os.environ.get("HEADRACE_EXAMPLES", "1"))))
def test_whatever_breaks_nothing_is_wrong_lost_or_left(seed: int) -> None:
    live(seed)
