"""The gateway's queue: when those who wait notice that a worker is free, and when they give up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from members import member

from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Band
from headrace.cluster.credit import Credit
from headrace.cluster.delivery import Delivery
from headrace.cluster.demand import Demand
from headrace.cluster.dispatch import Dispatch, Placed
from headrace.cluster.journey import Journeys
from headrace.cluster.ledger import Accepted, Ledger
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions, QueueOptions
from headrace.cluster.registry import Registry
from headrace.cluster.stream import OutputStream
from headrace.protocol.requests import ErrorCode, GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.world import World

PATIENCE_S = 5.0


class Waiting:
    """One full worker, and a queue that places what it is told to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.options = GatewayOptions(
            replay_timeout_s=PATIENCE_S, queue=QueueOptions(timeout_s=3 * PATIENCE_S)
        )
        registry = Registry(self.options)
        self.worker = member("w")
        registry.register(self.worker.info, self.worker.channel, world.now())
        found = registry.get("w")
        assert found is not None
        self.worker = found
        self.worker.is_full = True
        self.demand: defaultdict[str, Demand] = defaultdict(Demand)
        self.placed_s: list[float] = []
        self.order: list[str] = []
        self.observer = Watched()
        self._journeys = Journeys()
        self.ledger = Ledger()
        delivery = Delivery(world, self.observer, self.ledger, self._over)
        self.backlog = Backlog(
            world, self.options, registry, self.ledger, cast(Dispatch, self), delivery, self.observer
        )

    def ask(self, name: str = "r", *, lost: bool = True, n: int = 1, **fields: Any) -> Accepted:
        """A request that begins to wait now: a new one, or one that `lost` its worker."""
        request = GenerateRequest(
            request_id=name,
            prompt=[1, 2],
            sampling=SamplingParams(max_tokens=2, n=n),
            model=self.worker.model,
            **fields,
        )
        stream = OutputStream([(name, i) for i in range(n)], lambda request_id, index, counts_as: None)
        journey = self._journeys.begin(name, 2, self.world.now())
        accepted = self.ledger.enter(request, stream, journey, self.world.now())
        accepted.failures = int(lost)
        (self.backlog.enter_again if lost else self.backlog.enter)(accepted)
        return accepted

    def tell_of_room(self) -> None:
        self.worker.is_full = False
        self.backlog.poke()

    def _over(self, accepted: Accepted) -> None:
        self.ledger.strike_off(accepted)
        self.backlog.forget(accepted)

    # ---- what sends requests to workers ----------------------------------------------------------------

    def credit(self, model: str) -> Credit:
        everybody = frozenset() if self.worker.is_full else frozenset(Band)
        return Credit(dict.fromkeys(Band, self.worker.room), everybody)

    def passes_in_s(self, model: str, tokens: float, samples: float) -> float:
        return 2.1 * tokens + 2.8 * samples

    def place(self, accepted: Accepted) -> Placed:
        if self.worker.is_full:
            return Placed.NO
        self.placed_s.append(self.world.now())
        self.order.append(accepted.request.request_id)
        return Placed.YES


class Watched(GatewayObserver):
    """How many wait, and how long those waited that went on."""

    def __init__(self) -> None:
        self.count = 0
        self.waited_s: list[float | None] = []

    def queued(self, request: GenerateRequest) -> None:
        self.count += 1

    def unqueued(self, request: GenerateRequest, waited_s: float | None) -> None:
        self.count -= 1
        self.waited_s.append(waited_s)


def in_virtual_time(body: Callable[[Waiting], Awaitable[None]]) -> None:
    async def main(simulation: Simulation) -> None:
        waiting = Waiting(simulation.world("gateway"))
        await body(waiting)
        await waiting.backlog.close()

    run(main, max_virtual_s=60.0)


def test_word_of_room_counts_in_whichever_turn_of_the_loop_it_comes() -> None:
    for turns in range(5):

        async def body(waiting: Waiting, turns: int = turns) -> None:
            loop = asyncio.get_running_loop()

            def later(left: int) -> None:
                if left:
                    loop.call_soon(later, left - 1)
                else:
                    waiting.tell_of_room()

            began_s = waiting.world.now()
            waiting.ask()
            loop.call_soon(later, turns)
            await asyncio.sleep(2 * PATIENCE_S)
            assert waiting.placed_s, turns
            assert waiting.placed_s[0] < began_s + 0.1, turns

        in_virtual_time(body)


def test_who_has_waited_long_enough_looks_once_more() -> None:
    async def body(waiting: Waiting) -> None:
        accepted = waiting.ask()
        await asyncio.sleep(PATIENCE_S / 2)
        waiting.worker.is_full = False  # and nobody says so
        await asyncio.sleep(PATIENCE_S)
        assert len(waiting.placed_s) == 1
        assert accepted.samples

    in_virtual_time(body)


def test_who_finds_no_room_then_either_gives_up() -> None:
    async def body(waiting: Waiting) -> None:
        accepted = waiting.ask()
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert not accepted.samples
        assert not waiting.placed_s

    in_virtual_time(body)


def test_a_new_request_waits_longer_than_one_that_lost_its_worker() -> None:
    async def body(waiting: Waiting) -> None:
        new, old = waiting.ask("new", lost=False), waiting.ask("old")
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert new.samples and not old.samples
        await asyncio.sleep(2 * PATIENCE_S)
        assert not new.samples
        old_error, new_error = [
            output.finish.error
            for accepted in (old, new)
            for outputs in [await anext(accepted.stream)]
            for output in outputs
            if output.finish is not None and output.finish.error is not None
        ]
        assert (old_error.code, new_error.code) == (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED)
        assert old_error.retry_after_s is None
        assert new_error.retry_after_s == 7 and "try again in 7 s" in new_error.message
        assert waiting.observer.waited_s == [None, None]
        assert waiting.observer.count == 0
        assert not waiting.backlog

    in_virtual_time(body)


def test_they_go_on_by_class_and_those_that_lost_a_worker_first() -> None:
    async def body(waiting: Waiting) -> None:
        for name, fields in (
            ("low", {"priority": 1, "lost": False}),
            ("normal", {"lost": False}),
            ("high", {"priority": -1, "lost": False}),
            ("again", {}),
            ("again and low", {"priority": 5}),
        ):
            waiting.ask(name, **fields)
        lengths = [(queue.band, queue.requests, queue.tokens) for queue in waiting.backlog.queues()]
        assert lengths == [(Band.HIGH, 1, 2), (Band.NORMAL, 2, 4), (Band.LOW, 2, 4)]
        await asyncio.sleep(1.0)
        assert {round(queue.longest_s, 6) for queue in waiting.backlog.queues()} == {1.0}
        waiting.tell_of_room()
        await asyncio.sleep(0.1)
        assert waiting.order == ["high", "again", "normal", "again and low", "low"]
        assert waiting.observer.waited_s == [pytest.approx(1.0)] * 5

    in_virtual_time(body)


def test_who_finds_nobody_before_it_is_placed_at_once() -> None:
    async def body(waiting: Waiting) -> None:
        waiting.ask("low", priority=1)
        waiting.worker.is_full = False  # and nobody says so
        waiting.ask("high", priority=-1, lost=False)
        assert waiting.order == ["high"]
        waiting.ask("lower", priority=2, lost=False)
        assert waiting.order == ["high"]  # one of its class waits
        await asyncio.sleep(0.1)
        assert waiting.order == ["high", "low", "lower"]

    in_virtual_time(body)


def test_a_cancelled_one_leaves() -> None:
    async def body(waiting: Waiting) -> None:
        gone, stays = waiting.ask("gone", lost=False), waiting.ask("stays", lost=False, n=2)
        waiting.worker.is_full = False
        most = waiting.worker.most_samples
        assert waiting.backlog.room(waiting.worker.model) == most - 3
        waiting._over(gone)
        assert waiting.backlog.room(waiting.worker.model) == most - 2
        waiting.tell_of_room()
        await asyncio.sleep(0.1)
        assert waiting.order == ["stays"]
        assert stays.samples

    in_virtual_time(body)


def test_a_newcomer_takes_no_more_places_than_its_own_when_there_are_too_few() -> None:
    """More wait than there are places, since a worker gave requests back: that is nobody's who comes."""

    async def body(waiting: Waiting) -> None:
        low = [waiting.ask(f"low{i}", lost=False, priority=1, tenant="a") for i in range(5)]
        assert waiting.backlog.room(waiting.worker.model) == -5
        urgent = GenerateRequest(
            request_id="high",
            prompt=[1, 2],
            sampling=SamplingParams(max_tokens=2, n=2),
            model=waiting.worker.model,
            priority=-1,
            tenant="b",
        )
        assert waiting.backlog.takes([urgent])
        waiting.backlog.make_room([urgent])
        assert [bool(one.samples) for one in low] == [True, True, True, False, False]

    in_virtual_time(body)
