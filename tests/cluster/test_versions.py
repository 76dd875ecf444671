"""Weighted versions behind one name, and the step down to a smaller model."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from house import request
from test_several_models import LARGE, MODELS, SMALL, Houses, in_houses, of

from headrace.cluster.options import (
    AdmissionOptions,
    AliasOptions,
    DegradeStep,
    GatewayOptions,
    ModelOptions,
    ServiceLevels,
)
from headrace.cluster.versions import Choice, StepDown, Versions
from headrace.engine.limits import RequestRefused

ALIASES = (AliasOptions(name="chat", versions=((LARGE, 90.0), (SMALL, 10.0))),)
DRAWS = 10_000


def versions(*aliases: AliasOptions, gone: tuple[str, ...] = (), seed: int = 0) -> Versions:
    options = GatewayOptions(aliases=aliases or ALIASES)
    return Versions(options, lambda model: model not in gone, random.Random(seed))


def test_chance_gives_each_version_its_share() -> None:
    drawing = versions()
    drawn = Counter(drawing.choose("chat").model for _ in range(DRAWS))
    assert drawn[LARGE] / DRAWS == pytest.approx(0.9, abs=0.01)


def test_sessions_get_their_shares_and_keep_their_version() -> None:
    drawing, other = versions(), versions(seed=1)
    drawn = {f"s{number}": drawing.choose("chat", f"s{number}").model for number in range(DRAWS)}
    assert Counter(drawn.values())[LARGE] / DRAWS == pytest.approx(0.9, abs=0.01)
    assert all(other.choose("chat", session).model == model for session, model in drawn.items())


def test_a_version_that_comes_moves_no_sessions_among_the_others() -> None:
    three = AliasOptions(name="chat", versions=(("a", 3.0), ("b", 1.0), ("c", 1.0)))
    all_there, without = versions(three), versions(three, gone=("c",))
    moved: Counter[tuple[str, str]] = Counter()
    for number in range(2000):
        before, after = (one.choose("chat", f"s{number}").model for one in (all_there, without))
        moved[before, after] += 1
    assert {pair for pair in moved if pair[0] != pair[1]} == {("c", "a"), ("c", "b")}
    assert moved["c", "a"] / (moved["c", "a"] + moved["c", "b"]) == pytest.approx(0.75, abs=0.07)


def test_another_weight_moves_sessions_only_to_who_has_gained() -> None:
    def drawn(weight: float) -> list[str]:
        alias = AliasOptions(name="chat", versions=(("a", weight), ("b", 1.0), ("c", 2.0)))
        return [versions(alias).choose("chat", f"s{number}").model for number in range(2000)]

    moved = Counter(pair for pair in zip(drawn(1.0), drawn(3.0), strict=True) if pair[0] != pair[1])
    assert set(moved) == {("b", "a"), ("c", "a")}
    assert sum(moved.values()) / 2000 == pytest.approx(1 / 2 - 1 / 4, abs=0.04)


def test_names_draw_apart_from_each_other() -> None:
    both = [AliasOptions(name=name, versions=(("a", 1.0), ("b", 1.0))) for name in ("x", "y")]
    drawing = versions(*both)
    alike = sum(
        drawing.choose("x", f"s{n}").model == drawing.choose("y", f"s{n}").model for n in range(DRAWS)
    )
    assert alike / DRAWS == pytest.approx(0.5, abs=0.03)


def test_the_share_of_a_version_without_workers_goes_to_the_others_and_is_told() -> None:
    drawing = versions(gone=(LARGE,))
    for session in ("", "s"):
        choice = drawing.choose("chat", session)
        assert choice.model == SMALL
        assert f"chat is {SMALL} 100%: by {'its session' if session else 'chance'}" in choice.why
        assert f"without {LARGE}, which no worker serves now" in choice.why
    nobody = versions(gone=(LARGE, SMALL))
    assert {nobody.choose("chat").model for _ in range(100)} == {LARGE, SMALL}


def test_a_version_without_weight_gets_nothing_new() -> None:
    drawing = versions(AliasOptions(name="chat", versions=(("a", 0.0), ("b", 2.0))))
    assert drawing.choose("chat").model == "b"
    assert drawing.of("chat") == {"a": 0.0, "b": 1.0}


def test_one_that_cannot_take_a_request_is_left_out_while_there_is_another() -> None:
    drawing = versions()
    for session in ("", *map(str, range(50))):
        choice = drawing.choose("chat", session, unfit=[LARGE], why="which cannot sing")
        assert choice.model == SMALL
        assert choice.why.endswith(f"; without {LARGE}, which cannot sing")
    assert drawing.choose("chat", unfit=[LARGE, SMALL]).model in (LARGE, SMALL)
    gone = versions(gone=(SMALL,))
    assert gone.choose("chat", unfit=[LARGE]).model == SMALL  # which has none: the client hears of that


def test_sessions_that_could_go_to_all_versions_stay_where_they_are() -> None:
    drawing = versions(AliasOptions(name="chat", versions=(("a", 1.0), ("b", 1.0), ("c", 1.0))))
    for number in range(300):
        anything = drawing.choose("chat", f"s{number}").model
        without_c = drawing.choose("chat", f"s{number}", unfit=["c"]).model
        assert without_c == anything or anything == "c"


@pytest.mark.parametrize("weight", [1e308, 1e-308, 1.0])
def test_weights_are_shares_whatever_their_size(weight: float) -> None:
    drawing = versions(AliasOptions(name="chat", versions=(("a", weight), ("b", weight))))
    assert drawing.of("chat") == {"a": 0.5, "b": 0.5}
    assert {drawing.choose("chat").model for _ in range(50)} == {"a", "b"}


def test_a_name_of_its_own_is_no_draw() -> None:
    assert versions().choose(LARGE, "s") == Choice(LARGE, LARGE)


def test_what_is_smaller_is_the_names_own_or_its_versions() -> None:
    models = (ModelOptions(name="a", smaller="s"), ModelOptions(name="b"), ModelOptions(name="s"))
    plain = AliasOptions(name="plain", versions=(("a", 1.0),))
    own = AliasOptions(name="own", versions=(("a", 1.0),), smaller="b")
    itself = AliasOptions(name="itself", versions=(("b", 1.0),), smaller="b")
    options = GatewayOptions(models=models, aliases=(plain, own, itself))
    drawing = Versions(options, lambda model: True, random.Random(0))
    found = {name: drawing.choose(name).smaller for name in ("a", "b", "plain", "own", "itself")}
    assert found == {"a": "s", "b": "", "plain": "s", "own": "b", "itself": ""}
    assert drawing.choose("own").stepped_down(1.5) == Choice(
        "own", "b", drawing.choose("own").why, instead_of="a", pressure=1.5
    )


def test_a_draw_is_kept_with_the_request() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1")
        gateway = houses.gateway
        choice = gateway.versions.choose("chat", "s")
        asked = of(choice.model, "r")
        stream = gateway.submit(asked, choice=choice)
        (journey,) = gateway.journeys.of("r")
        assert journey.entries[0].what == "version drawn"
        assert journey.entries[0].detail == {"model": choice.model, "why": choice.why}
        stream.close()
        await houses.kill("large-1")
        while len(list(gateway.registry.live())) > 1:
            await gateway.wait_changed()
        assert {gateway.versions.choose("chat").model for _ in range(50)} == {SMALL}

    in_houses(body, replace(MODELS, aliases=ALIASES))


UNDER_PRESSURE = replace(
    MODELS,
    # Steps of the small model are a fifth as long: what it may expect lies between the two.
    slo=ServiceLevels(ttft_s=0.02, tpot_s=0.006),
    admission=AdmissionOptions(
        degrade=(DegradeStep(lower="max_tokens", to=4, above=0.5), DegradeStep(lower="model", above=0.9))
    ),
)
TO_SMALL = Choice(LARGE, LARGE, smaller=SMALL)


async def warm(houses: Houses) -> None:
    """Let the gateway learn how long steps take."""
    await houses.start("large-1", "small-1")
    await asyncio.gather(*(houses.tokens(of(m, f"w-{m}-{i}", 20)) for m in (LARGE, SMALL) for i in range(2)))


def test_under_pressure_the_smaller_model_serves_and_the_answer_says_so() -> None:
    async def body(houses: Houses) -> None:
        await warm(houses)
        asked = of(LARGE, "r", 30)
        with pytest.raises(StepDown):
            houses.gateway.submit(asked, choice=TO_SMALL)
        assert houses.gateway.open_samples == 0
        choice = TO_SMALL.stepped_down(1.5)
        stream = houses.gateway.submit(of(choice.model, "r", 30), choice=choice)
        assert stream.degraded[0] == f"model={SMALL}"
        (journey,) = houses.gateway.journeys.of("r")
        assert journey.entries[0].what == "degraded"
        assert str(journey.entries[0].detail["why"]).startswith(f"model={SMALL}")
        assert journey.entries[0].detail["instead_of"] == LARGE
        stream.close()

    in_houses(body, UNDER_PRESSURE)


def test_who_has_no_smaller_model_or_high_priority_keeps_its_own() -> None:
    async def body(houses: Houses) -> None:
        await warm(houses)
        with houses.gateway.submit(of(LARGE, "a", 30), choice=Choice(LARGE, LARGE)) as stream:
            assert stream.degraded == ("max_tokens=4",)
        urgent = msgspec.structs.replace(of(LARGE, "b", 30), priority=-1)
        with houses.gateway.submit(urgent, choice=TO_SMALL) as stream:
            assert stream.degraded == ()

    in_houses(body, UNDER_PRESSURE)


def test_a_smaller_model_without_workers_or_no_sooner_is_no_help() -> None:
    async def body(houses: Houses) -> None:
        await warm(houses)
        slower = Choice(SMALL, SMALL, smaller=LARGE)
        with houses.gateway.submit(of(SMALL, "a", 30), choice=slower) as stream:
            assert "model" not in str(stream.degraded)
        await houses.kill("small-1")
        while len(list(houses.gateway.registry.live())) > 1:
            await houses.gateway.wait_changed()
        with houses.gateway.submit(of(LARGE, "b", 30), choice=TO_SMALL) as stream:
            assert stream.degraded == ("max_tokens=4",)

    in_houses(body, UNDER_PRESSURE)


def test_a_smaller_model_that_would_be_later_does_not_serve() -> None:
    async def body(houses: Houses) -> None:
        await warm(houses)
        slower = Choice(SMALL, SMALL, smaller=LARGE)
        with houses.gateway.submit(of(SMALL, "a", 30), choice=slower) as stream:
            assert stream.degraded == ("max_tokens=4",)

    in_houses(body, replace(UNDER_PRESSURE, slo=ServiceLevels(ttft_s=1e-4, tpot_s=1e-4)))


def test_full_queues_are_pressure_too() -> None:
    async def body(houses: Houses) -> None:
        await warm(houses)
        large = houses.gateway.registry.get("large-1")
        assert large is not None
        streams = [houses.gateway.submit(of(LARGE, f"f{i}", 250)) for i in range(large.most_samples)]
        with pytest.raises(RequestRefused, match="the limit is"):
            houses.gateway.submit(of(LARGE, "r"))
        with pytest.raises(StepDown):
            houses.gateway.submit(of(LARGE, "r"), choice=TO_SMALL)
        for stream in streams:
            stream.close()

    in_houses(body, replace(UNDER_PRESSURE, slo=ServiceLevels(ttft_s=1000.0, tpot_s=1000.0)))


def test_runs_are_alike() -> None:
    drawn: list[list[str]] = []

    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1")
        models = [houses.gateway.versions.choose("chat").model for _ in range(40)]
        for number, model in enumerate(models[:10]):
            await houses.tokens(msgspec.structs.replace(request(f"r{number}"), model=model))
        drawn.append(models)

    options = replace(MODELS, aliases=ALIASES)
    assert in_houses(body, options) == in_houses(body, options)
    assert drawn[0] == drawn[1]
