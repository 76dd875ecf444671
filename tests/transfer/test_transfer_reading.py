"""Pulls whose target reads the source's memory by itself: what is shown, taken, given up, and never used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headrace.protocol.channel import Channel
from headrace.protocol.handoff import BlockSpan, Cause, Computed, Exporting, Reserved, Ticket
from headrace.sim import Simulation, run
from headrace.sim.agent import SimAgent
from headrace.sim.link import LinkProfile
from headrace.sim.network import Crash
from headrace.transfer import Connector, Exports, Fetched, Pool, TransferFailed, fetch
from headrace.transfer.messages import Confirm, Confirmed, FromTarget, Shown, Taken, Want, sum_of_places
from headrace.world import Connection, MemoryAgent

BLOCK_BYTES = 1000
BLOCK_SIZE = 4
BLOCKS = 6
LEASE_S = 5.0
SLOW = LinkProfile(bytes_per_s=1000.0)
"""Over which a block takes a second."""


class Bytes:
    def __init__(self, count: int) -> None:
        self.buffer = memoryview(bytearray(count * BLOCK_BYTES))

    def close(self) -> None:
        self.buffer = memoryview(b"")


class House:
    """A source that holds or computes one export, and a target that has reserved blocks for it."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.released: list[tuple[float, str]] = []
        self.lines: list[str] = []

    async def open(self) -> None:
        simulation = self.simulation
        self.worlds = {host: simulation.world(host) for host in ("source", "target")}
        self.memories = {host: Bytes(10) for host in self.worlds}
        self.agents: dict[str, MemoryAgent] = {}
        for host, world in self.worlds.items():
            simulation.memories[host] = self.memories[host]
            size = self.memories[host].buffer.nbytes
            self.agents[host] = await world.open_agent(host, size, f"{host}:1", print)
        self.places = [7, 2, 9, 0, 5, 3]
        for number, place in enumerate(self.places):
            at = place * BLOCK_BYTES
            self.memories["source"].buffer[at : at + BLOCK_BYTES] = block(number)
        self.exports = Exports(
            self.worlds["source"],
            self.pool("source"),
            worker_id="p",
            generation=1,
            address="source:7200",
            released=lambda name, how: self.released.append((simulation.loop.now, how)),
            lease_s=LEASE_S,
            agent=self.agents["source"],
        )
        self.listener = await self.worlds["source"].network.listen(
            "source:7200", self.exports.serve, plain=True
        )
        self.ticket = self.exports.offer(Exporting("r", BLOCK_SIZE * BLOCKS, []))

    def pool(self, host: str) -> Pool:
        return Pool(self.memories[host].buffer, BLOCK_BYTES, BLOCK_SIZE, "layout")

    def computed(self, first: int, last: int) -> None:
        span = BlockSpan(0, first, self.places[first:last])
        self.exports.computed(Computed("r", last * BLOCK_SIZE, [span]))

    def hold(self) -> None:
        self.computed(0, BLOCKS)
        self.exports.held("r")

    @property
    def servings(self) -> int:
        agent = self.agents["source"]
        assert isinstance(agent, SimAgent)
        return agent._servings

    def arrived(self) -> list[int]:
        """Which blocks are at the target."""
        memory = self.memories["target"].buffer
        return [n for n in range(BLOCKS) if memory[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] == block(n)]

    def connector(self) -> Connector:
        return Connector(self.agents["target"], checked=True, report=self.lines.append)

    def pull(self, ticket: Ticket | None = None) -> asyncio.Task[Fetched]:
        reserved = Reserved("i", BLOCK_SIZE * BLOCKS, 0, [BlockSpan(0, 0, list(range(BLOCKS)))], [])
        pulling = fetch(
            self.worlds["target"],
            self.pool("target"),
            reserved,
            ticket or self.ticket,
            connector=self.connector(),
        )
        return asyncio.create_task(pulling)


def block(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK_BYTES


def within(body: Callable[[House], Awaitable[None]]) -> None:
    async def main(simulation: Simulation) -> None:
        house = House(simulation)
        await house.open()
        await body(house)
        await house.listener.close()
        await house.exports.close()
        for agent in house.agents.values():
            await agent.close()

    run(main, max_virtual_s=1000.0)


def test_blocks_are_read_as_they_are_computed_and_nothing_is_polled_between() -> None:
    async def body(house: House) -> None:
        pulling = house.pull()
        house.computed(0, 2)
        await asyncio.sleep(1.0)
        assert house.arrived() == [0, 1]
        assert house.servings == 0  # the rest of the prompt may take its time
        house.computed(2, BLOCKS)
        await asyncio.sleep(1.0)
        assert house.arrived() == list(range(BLOCKS))
        assert not pulling.done()  # nothing is confirmed before the prompt is complete
        house.exports.held("r")
        fetched = await pulling
        assert (fetched.blocks, fetched.read) == (BLOCKS, BLOCKS)
        assert [how for _, how in house.released] == ["confirmed"]
        assert house.servings == 0
        assert house.lines == ["KV blocks from p come over NIXL"]

    within(body)


@pytest.mark.parametrize("lost", ["source", "target"])
def test_what_cannot_be_read_comes_as_bytes(lost: str) -> None:
    async def body(house: House) -> None:
        pulling = house.pull()
        house.computed(0, 2)
        await asyncio.sleep(1.0)
        agent = house.agents[lost]
        assert isinstance(agent, SimAgent)
        assert agent.kill()
        house.hold()
        fetched = await pulling
        assert (fetched.blocks, fetched.read) == (BLOCKS, 2)
        assert house.arrived() == list(range(BLOCKS))
        assert [how for _, how in house.released] == ["confirmed"]
        assert "come over TCP: its memory cannot be read" in house.lines[-1]

    within(body)


def test_a_source_that_could_not_be_read_is_not_tried_again_until_its_agent_is_another() -> None:
    async def body(house: House) -> None:
        connector = house.connector()
        assert connector.reads(house.ticket) is house.agents["target"]
        connector.failed(house.ticket, "nobody answers")
        assert connector.reads(house.ticket) is None
        agent = house.agents["source"]
        assert isinstance(agent, SimAgent)
        agent.kill()
        await asyncio.sleep(5.0)
        assert connector.reads(house.exports.offer(Exporting("r2", 4, []))) is house.agents["target"]

    within(body)


def test_an_end_without_an_agent_is_told_once() -> None:
    async def body(house: House) -> None:
        lines: list[str] = []
        none = Connector(None, lacks="NIXL is not installed", report=lines.append)
        assert none.reads(house.ticket) is none.reads(house.ticket) is None
        assert lines == ["KV blocks from p come over TCP: NIXL is not installed"]
        Connector(None, report=lines.append).reads(house.ticket)  # nobody asked for one
        assert len(lines) == 1

    within(body)


def test_a_changed_byte_is_found_by_its_blocks_checksum() -> None:
    async def body(house: House) -> None:
        house.hold()
        house.simulation.network.set_link("source", "target", SLOW)
        pulling = house.pull()
        await asyncio.sleep(1.0)
        house.simulation.network.corrupt("source", "target", after_bytes=10)
        with pytest.raises(TransferFailed) as failure:
            await pulling
        assert failure.value.cause is Cause.CORRUPT

    within(body)


def test_a_lease_that_expires_under_a_read_is_kept_until_the_reader_has_left() -> None:
    async def body(house: House) -> None:
        house.simulation.network.set_link("source", "target", LinkProfile(bytes_per_s=1100.0))
        house.hold()
        pulling = house.pull()
        with pytest.raises(TransferFailed) as failure:
            await pulling
        left_s = house.simulation.loop.now
        await asyncio.sleep(0.1)
        ((released_s, how),) = house.released
        assert failure.value.cause is Cause.DENIED
        assert how == "expired"
        assert LEASE_S + 0.5 < left_s < released_s < LEASE_S + 1.0

    within(body)


def test_a_read_that_is_given_up_writes_no_more_when_the_pull_has_ended() -> None:
    async def body(house: House) -> None:
        house.simulation.network.set_link("source", "target", SLOW)
        house.hold()
        pulling = house.pull()
        await asyncio.sleep(2.5)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        memory = house.memories["target"].buffer
        assert any(memory)  # it was in the middle of it
        memory[:] = bytes(memory.nbytes)
        house.simulation.network.set_link("source", "target", LinkProfile())
        await asyncio.sleep(10.0)
        assert not any(memory)

    within(body)


@pytest.mark.parametrize("how", [Crash.RESET, Crash.SILENT])
def test_a_source_that_dies_under_a_read_ends_the_pull(how: Crash) -> None:
    async def body(house: House) -> None:
        house.simulation.network.set_link("source", "target", SLOW)
        house.hold()
        pulling = house.pull()
        await asyncio.sleep(2.5)
        house.simulation.network.crash_host("source", how)
        pulling.get_loop().call_later(60.0, pulling.cancel)
        with pytest.raises(TransferFailed):
            await pulling

    within(body)


async def played(house: House, source: Callable[[Channel[FromTarget]], Awaitable[None]]) -> Fetched:
    """A pull from a source that the test plays."""

    async def serve(connection: Connection) -> None:
        channel: Channel[FromTarget] = Channel(connection, receives=FromTarget)
        want = await channel.receive()
        assert isinstance(want, Want)
        assert want.reads
        await source(channel)

    listener = await house.worlds["source"].network.listen("source:7300", serve, plain=True)
    ticket = Ticket(
        token=b"t",
        address=listener.address,
        memory=house.ticket.memory,
        worker_id="p",
        generation=1,
        kv_layout="layout",
        prompt_tokens=BLOCK_SIZE * BLOCKS,
        identities=[],
    )
    with house.agents["source"].serving():
        return await house.pull(ticket)


def test_a_changed_place_is_not_read() -> None:
    async def body(house: House) -> None:
        async def source(channel: Channel[FromTarget]) -> None:
            wrong = [*house.places[:-1], house.places[-1] ^ 1]
            channel.post(Shown(wrong, sum_of_places(house.places)))
            assert await channel.receive() is None

        with pytest.raises(TransferFailed) as failure:
            await played(house, source)
        assert failure.value.cause is Cause.CORRUPT
        assert house.arrived() == []

    within(body)


def test_what_is_not_confirmed_is_not_used() -> None:
    async def body(house: House) -> None:
        async def source(channel: Channel[FromTarget]) -> None:
            checksums = await house.agents["source"].checksums(
                [place * BLOCK_BYTES for place in house.places], BLOCK_BYTES
            )
            channel.post(Shown(house.places, sum_of_places(house.places), checksums))
            assert await channel.receive() == Taken(BLOCKS)
            assert await channel.receive() == Confirm()

        with pytest.raises(TransferFailed) as failure:
            await played(house, source)
        assert failure.value.cause is Cause.LOST

    within(body)


def test_a_source_that_cannot_take_checksums_sends_its_blocks() -> None:
    async def body(house: House) -> None:
        async def source(channel: Channel[FromTarget]) -> None:
            channel.post(Shown(house.places, sum_of_places(house.places)))
            asked = await channel.receive()
            assert isinstance(asked, Want)
            assert not asked.reads
            assert asked.names() == [(0, number) for number in range(BLOCKS)]
            channel.post(Confirmed())  # out of turn

        with pytest.raises(TransferFailed, match="out of turn"):
            await played(house, source)

    within(body)
