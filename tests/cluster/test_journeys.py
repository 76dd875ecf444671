"""Which requests can be asked about afterwards."""

from __future__ import annotations

import pytest

from headrace.cluster import journey
from headrace.cluster.journey import Journeys


@pytest.fixture
def journeys(monkeypatch: pytest.MonkeyPatch) -> Journeys:
    monkeypatch.setattr(journey, "KEPT", 3)
    return Journeys()


def test_the_last_that_ended_are_kept_and_a_flood_of_refusals_drives_out_none(journeys: Journeys) -> None:
    for number in range(5):
        journeys.end(journeys.begin(f"served{number}", 7, 0.0))
    for number in range(50):
        journeys.refuse(journeys.begin(f"refused{number}", 7, 0.0))
    assert [bool(journeys.of(f"served{number}")) for number in range(5)] == [False, False, True, True, True]
    assert [number for number in range(50) if journeys.of(f"refused{number}")] == [47, 48, 49]


def test_what_is_known_of_a_request_is_not_replaced_by_a_bare_refusal(journeys: Journeys) -> None:
    one = journeys.begin("a-0", 7, 0.0)
    one.note(1.0, "queued")
    journeys.refused("a", 2.0, why="too late")
    assert journeys.of("a") == [one]
    journeys.end(one)
    journeys.refused("a", 2.0, why="too late")
    assert journeys.of("a") == [one]
    journeys.refused("b", 2.0, why="not now")
    assert [(e.what, e.detail) for e in journeys.of("b")[0].entries] == [("refused", {"why": "not now"})]


def test_what_was_taken_back_is_known_as_refused_and_once(journeys: Journeys) -> None:
    one = journeys.begin("a-0", 7, 0.0)
    journeys.end(one)
    journeys.refuse(one)
    assert journeys.of("a") == [one]


def test_what_was_never_made_is_not_known(journeys: Journeys) -> None:
    journeys.drop(journeys.begin("a-0", 7, 0.0))
    assert journeys.of("a-0") == journeys.of("a") == []
