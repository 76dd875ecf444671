"""A worker's membership when its gateway goes without a word, or is away for long."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from headrace.cluster import Gateway, GatewayState
from headrace.cluster.options import GatewayOptions
from headrace.protocol.channel import Channel
from headrace.protocol.messages import FromWorker, Heartbeat, Rejected, Role, Welcome, WorkerInfo
from headrace.sim import Crash, Simulation, run
from headrace.sim.cluster import GATEWAY, SimCluster
from headrace.sim.launcher import TaskLauncher
from headrace.worker import Supervisor, WorkerOptions, serve
from headrace.worker.session import Session
from headrace.world import Connection

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import EngineShape

TWO_HEARTBEATS_S = 2 * GatewayOptions().heartbeat_s


def test_a_welcome_that_was_lost_with_its_gateway_is_not_waited_for() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"w": Role.BOTH})
        gateway = cluster.gateways[GATEWAY]
        await cluster.gateway.listen(gateway.address)
        cluster.workers["w"].start()
        while cluster.gateway.registry.get("w") is None:
            await cluster.gateway.wait_changed()
        simulation.network.partition(GATEWAY, "w", one_way=True)  # the welcome is on its way
        await asyncio.sleep(0.01)
        await gateway.crash(Crash.SILENT)
        simulation.network.heal(GATEWAY, "w")
        await gateway.restart()
        await cluster.complete(TWO_HEARTBEATS_S)
        await cluster.stop()

    run(main, max_virtual_s=100.0)


def test_a_gateway_that_was_away_for_long_knows_its_workers_as_soon() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"a": Role.BOTH, "b": Role.BOTH})
        await cluster.start()
        for away_s in (7.0, 7.3, 7.6, 7.9):  # wherever in its pauses a worker is when it comes back
            await cluster.gateways[GATEWAY].crash()
            await asyncio.sleep(away_s)
            await cluster.gateways[GATEWAY].restart()
            await cluster.complete(TWO_HEARTBEATS_S)
        await cluster.stop()

    run(main, max_virtual_s=100.0)


class Idle:
    """Orders of a worker that is asked for nothing."""

    draining = False

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: Heartbeat(0, 0.0) if name == "heartbeat" else None


def life(
    main: Callable[[Simulation, Session], Coroutine[Any, Any, None]], orders: Idle | None = None
) -> list[str]:
    """What a session of worker w with a gateway at g:1 says to people while `main` plays the gateway."""
    lines: list[str] = []

    async def both(simulation: Simulation) -> None:
        _, engine = EngineShape().build()
        info = WorkerInfo(worker_id="w", generation=1, role=Role.BOTH, data_address="", engine=engine)
        session = Session(simulation.world("w"), "g:1", info, orders or Idle(), lines.append)
        running = asyncio.create_task(session.run())
        await main(simulation, session)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run(both, max_virtual_s=1000.0)
    return lines


def test_each_reason_for_not_being_a_member_is_told_once_and_its_end_too() -> None:
    async def main(simulation: Simulation, session: Session) -> None:
        network = simulation.world("g").network
        await asyncio.sleep(10.0)  # nothing listens

        async def hang_up(connection: Connection) -> None:
            await connection.read(1)

        listener = await network.listen("g:1", hang_up)
        await asyncio.sleep(10.0)
        await listener.close()
        welcomed = asyncio.Event()

        async def welcome(connection: Connection) -> None:
            channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
            await channel.receive()
            channel.post(Welcome(1.0, 10.0))
            welcomed.set()
            while await channel.receive() is not None:
                pass

        listener = await network.listen("g:1", welcome)
        await welcomed.wait()
        await asyncio.sleep(15.0)  # without a word
        await listener.close()
        await asyncio.sleep(10.0)

    lines = life(main)
    assert [line.removeprefix("cannot join the gateway at g:1: ") for line in lines[:5]] == [
        "nothing listens there; dialling again",
        "it ended the connection without an answer; dialling again",
        "joined the gateway at g:1",
        "the gateway at g:1 was lost: it was silent for 10 s; dialling again",
        "joined the gateway at g:1",
    ]
    assert len(lines) <= 7  # the end of this listener is no surprise any more


def test_who_drains_and_loses_its_gateway_leaves_without_a_word() -> None:
    orders = Idle()
    hellos = 0

    async def main(simulation: Simulation, session: Session) -> None:
        async def welcome(connection: Connection) -> None:
            nonlocal hellos
            channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
            await channel.receive()
            hellos += 1
            channel.post(Welcome(1.0, 10.0))
            await asyncio.sleep(1.0)
            orders.draining = True

        listener = await simulation.world("g").network.listen("g:1", welcome)
        await asyncio.sleep(0.5)
        await listener.close()
        await asyncio.sleep(30.0)

    assert life(main, orders) == []
    assert hellos == 1


@pytest.mark.parametrize("answer", [None, Rejected("another is called so", later=True)])
def test_pauses_grow_until_a_welcome(answer: Rejected | None) -> None:
    dialled: list[float] = []

    async def main(simulation: Simulation, session: Session) -> None:
        async def refuse(connection: Connection) -> None:
            dialled.append(simulation.loop.time())
            channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
            await channel.receive()
            if len(dialled) == 20:
                channel.post(Welcome(1.0, 10.0))
            elif answer is not None:
                channel.post(answer)
            else:
                connection.abort()

        await simulation.world("g").network.listen("g:1", refuse)
        await asyncio.sleep(30.0)

    lines = life(main)
    pauses = [after - before for before, after in itertools.pairwise(dialled)]
    assert pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.05)
    assert pauses[4:19] == pytest.approx([1.0] * 15, abs=0.05)
    assert pauses[19] == pytest.approx(0.1, abs=0.05)
    assert len(lines) == 3  # why it is no member, that it is one, and why not again


def test_who_is_rejected_by_one_gateway_stays_with_the_other() -> None:
    async def main(simulation: Simulation) -> list[str]:
        _, info = EngineShape().build()
        lines: list[str] = []
        heard: list[FromWorker] = []

        async def reject(connection: Connection) -> None:
            channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
            heard.append(await channel.receive())  # type: ignore[arg-type]
            channel.post(Rejected("another model is served here"))

        def engine(address: str) -> Coroutine[Any, Any, None]:
            return serve(simulation.world("w"), address, EngineShape().build()[0], info)

        gateway = Gateway(simulation.world("g"))
        await gateway.listen("g:1")
        await simulation.world("h").network.listen("h:1", reject)
        options = WorkerOptions(worker_id="w", join=("h:1", "g:1"))
        worker = Supervisor(simulation.world("w"), options, TaskLauncher(engine), "w:1", report=lines.append)
        running = asyncio.create_task(worker.run())
        await gateway.wait_ready()
        await asyncio.sleep(10.0)
        assert not running.done()
        assert gateway.state is GatewayState.READY
        assert len(heard) == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await gateway.drain(0.0)
        return lines

    assert run(main, max_virtual_s=100.0).result == [
        "the gateway at h:1 rejects this worker: another model is served here; it stays with the others"
    ]
