"""Any history of arrivals, cancellations and steps leaves every request with what it gets alone."""

from __future__ import annotations

import random

from engine_scenarios import draw_scenario, examples
from engine_witness import play
from hypothesis import given, note
from hypothesis import strategies as st


@examples(400)
@given(st.randoms(use_true_random=False))
def test_whatever_happens_each_request_gets_what_it_gets_alone(rng: random.Random) -> None:
    scenario = draw_scenario(rng)
    note(scenario)
    play(scenario)
