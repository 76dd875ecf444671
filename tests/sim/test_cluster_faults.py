"""A cluster under faults: whatever breaks, every sample ends once, says nothing wrong, and nothing is left.

Replay a seed: headrace simulate --seeds 7
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from headrace.config.engine import usable_cores

SEEDS = 100 * int(os.environ.get("HEADRACE_EXAMPLES", "1"))
PATIENCE_S = 60 + 3 * SEEDS


@pytest.mark.timeout(PATIENCE_S + 10)
def test_whatever_breaks_nothing_is_wrong_lost_or_left() -> None:
    command = [sys.executable, "-m", "headrace", "simulate", "--seeds", f"0:{SEEDS}"]
    done = subprocess.run(
        [*command, "--jobs", str(usable_cores())], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SEEDS} histories, 0 with violations" in done.stdout
