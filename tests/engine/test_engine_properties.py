"""Any history of arrivals, cancellations and steps leaves every request with what it gets alone."""

from __future__ import annotations

import random

import pytest
from engine_scenarios import EXAMPLES, draw_scenario, examples
from engine_witness import play
from hypothesis import given, note
from hypothesis import strategies as st


@pytest.mark.timeout(600 * EXAMPLES)  # a failure is shrunk to a short history before it is shown
@examples(600)
@given(st.randoms(use_true_random=False))
def test_whatever_happens_each_request_gets_what_it_gets_alone(rng: random.Random) -> None:
    scenario = draw_scenario(rng)
    note(scenario)
    play(scenario)
