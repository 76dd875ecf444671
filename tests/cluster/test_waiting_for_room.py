"""Requests that found no worker with room: when they notice that there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from members import member

from headrace.cluster.delivery import Delivery
from headrace.cluster.journey import Journeys
from headrace.cluster.ledger import Accepted, Ledger
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.readiness import Readiness
from headrace.cluster.registry import Member, Registry
from headrace.cluster.replay import Replays
from headrace.cluster.stream import OutputStream
from headrace.protocol.messages import FromGateway
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.world import World

PATIENCE_S = 5.0


class Waiting:
    """One full worker, and the desk of a gateway that places what it is told to."""

    is_draining = False

    def __init__(self, world: World) -> None:
        self.world = world
        options = GatewayOptions(replay_timeout_s=PATIENCE_S)
        registry = Registry(options)
        self.worker = member("w")
        registry.register(self.worker.info, self.worker.channel, world.now())
        found = registry.get("w")
        assert found is not None
        self.worker = found
        self.worker.is_full = True
        self.readiness = Readiness(registry)
        self.placed_s: list[float] = []
        self._journeys = Journeys()
        self._ledger = Ledger()
        delivery = Delivery(world, GatewayObserver(), self._ledger, self._over)
        self.replays = Replays(world, options, registry, delivery, GatewayObserver(), self)

    def ask(self) -> Accepted:
        """A request that begins to wait now."""
        request = GenerateRequest(
            request_id="r", prompt=[1, 2], sampling=SamplingParams(max_tokens=2), model=self.worker.model
        )
        stream = OutputStream([("r", 0)], lambda request_id, index, counts_as: None)
        journey = self._journeys.begin("r", 2, self.world.now())
        accepted = self._ledger.enter(request, stream, journey, self.world.now())
        self.replays.wait(accepted)
        return accepted

    def tell_of_room(self) -> None:
        self.worker.is_full = False
        self.readiness.tell_changed()

    def _over(self, accepted: Accepted) -> None:
        self.replays.forget(accepted)

    # ---- the desk --------------------------------------------------------------------------------------

    def place(self, accepted: Accepted) -> None:
        self.placed_s.append(self.world.now())

    def leave_home(self, accepted: Accepted) -> None: ...
    def leave_prefill(self, accepted: Accepted) -> None: ...
    def post(self, member: Member, message: FromGateway) -> None: ...

    async def wait_changed(self) -> None:
        await self.readiness.wait_changed()


def in_virtual_time(body: Callable[[Waiting], Awaitable[None]]) -> None:
    async def main(simulation: Simulation) -> None:
        waiting = Waiting(simulation.world("gateway"))
        await body(waiting)
        await waiting.replays.close()

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
