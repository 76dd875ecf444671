"""What a simulated life looks at beside tokens: excuses of errors, books of gateways, what supervisors owe.

Each defect breaks one of these and nothing that a client would see as wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace.cluster import Gateway
from headrace.cluster.ledger import Accepted
from headrace.cluster.replay import Replays
from headrace.sim.cluster import Violation
from headrace.sim.life import live, plan
from headrace.worker.imports import Imports
from headrace.worker.relay import Relay
from headrace.worker.session import Session

Patch = pytest.MonkeyPatch


def give_up_at_the_first_death(patch: Patch) -> None:
    real = Replays.again

    def again(self: Replays, accepted: Accepted, why: str, *, full: bool = False) -> None:
        accepted.deaths = 2
        real(self, accepted, why, full=full)

    patch.setattr(Replays, "again", again)


def keep_lost_samples_in_the_books(patch: Patch) -> None:
    def leave_home(self: Gateway, accepted: Accepted) -> None:
        leg, accepted.home = accepted.home, None
        if leg is not None:
            self._ledger.close_leg(leg)

    patch.setattr(Gateway, "leave_home", leave_home)


def keep_attempts_that_ended(patch: Patch) -> None:
    def forget(self: Relay, session: Session, request_id: str) -> None:
        session.open.pop(request_id, None)

    patch.setattr(Relay, "_forget_attempt", forget)


def keep_imports_that_began(patch: Patch) -> None:
    real = Imports._continue

    def go_on(self: Imports, request_id: str, one: Any) -> None:
        real(self, request_id, one)
        self._open[request_id] = one

    patch.setattr(Imports, "_continue", go_on)


DEFECTS = {
    give_up_at_the_first_death: (1, "nothing excuses"),
    keep_lost_samples_in_the_books: (0, "samples"),
    keep_attempts_that_ended: (0, "attempts"),
    keep_imports_that_began: (2, "imports"),
}


@pytest.mark.parametrize("plant", DEFECTS, ids=lambda plant: plant.__name__)
def test_it_is_caught(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    seed, told = DEFECTS[plant]
    plant(monkeypatch)
    with pytest.raises(Violation, match=told):
        live(seed)


def test_without_faults_no_sample_ends_with_an_error() -> None:
    assert live(2, plan(2, kinds=())).endings["error"] == 0
