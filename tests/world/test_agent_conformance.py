"""What `MemoryAgent` promises, held against NIXL in processes of its own and against the simulated agent."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil
import pytest

from headrace.sim import Simulation, run
from headrace.sim.agent import SimAgent
from headrace.world import AgentUnavailable, MemoryAgent, ReadFailed
from headrace.world.nixl import NixlAgent, open_nixl
from headrace.world.nixl_messages import PACKAGES
from headrace.world.shared_memory import SharedMemory

SIZE = 1 << 20
PIECE = 4096
HAS_NIXL = any(importlib.util.find_spec(name) for name in PACKAGES)


@dataclass(frozen=True)
class End:
    """One worker's memory and its agent."""

    memory: memoryview
    agent: MemoryAgent

    async def kill(self) -> None:
        """Let the agent die as it does when its process or its machine does, and stay dead."""
        if isinstance(self.agent, NixlAgent):
            process = self.agent._process
            assert process is not None
            process.kill()
            await process.wait()
        elif isinstance(self.agent, SimAgent):
            await self.agent._lose()

    async def stands(self) -> None:
        """Wait until the agent can be read, which a lost one can be again."""
        async with asyncio.timeout(30.0):
            while not self.agent.address:
                await asyncio.sleep(0.05)


Body = Callable[[End, End], Awaitable[None]]


def real(body: Body) -> None:
    async def main() -> None:
        memories = [SharedMemory(SIZE), SharedMemory(SIZE)]
        agents = await asyncio.gather(*(open_nixl(memory.path, SIZE, "127.0.0.1:0") for memory in memories))
        try:
            await body(*(End(m.buffer, a) for m, a in zip(memories, agents, strict=True)))
        finally:
            await asyncio.gather(*(agent.close() for agent in agents))
            for memory in memories:
                memory.close()

    asyncio.run(main())


class Bytes:
    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(SIZE))

    def close(self) -> None:
        self.buffer = memoryview(b"")


def simulated(body: Body) -> None:
    async def main(simulation: Simulation) -> None:
        ends = []
        for host in ("source", "target"):
            memory = simulation.memories[host] = Bytes()
            agent = await simulation.world(host).open_agent(host, SIZE, f"{host}:7200", print)
            ends.append(End(memory.buffer, agent))
        await body(*ends)
        for end in ends:
            await end.agent.close()

    run(main, max_virtual_s=1000.0)


Within = Callable[[Body], None]


NEEDS_NIXL = pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed (headrace[nixl])")


@pytest.fixture(
    params=[
        pytest.param("nixl over memory", marks=NEEDS_NIXL),
        pytest.param("nixl over tcp", marks=NEEDS_NIXL),
        "simulated",
    ]
)
def within(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Within:
    """Runs a test's body with a source and a target."""
    if request.param == "nixl over tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return simulated if request.param == "simulated" else real


def fill(memory: memoryview) -> None:
    """Every piece with other bytes."""
    for number in range(SIZE // PIECE):
        memory[number * PIECE : (number + 1) * PIECE] = number.to_bytes(2, "big") * (PIECE // 2)


def test_pieces_come_from_where_and_to_where_they_were_asked_for(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        fill(source.memory)
        ours, theirs = [5 * PIECE, 0, 9 * PIECE], [PIECE, 7 * PIECE, 200 * PIECE]
        with source.agent.serving():
            await target.agent.read(source.agent.address, ours, theirs, PIECE)
        for here, there in zip(ours, theirs, strict=True):
            assert target.memory[here : here + PIECE] == source.memory[there : there + PIECE]
        untouched = set(range(SIZE // PIECE)) - {5, 0, 9}
        assert not any(any(target.memory[n * PIECE : (n + 1) * PIECE]) for n in untouched)

    within(body)


def test_several_reads_at_once(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        fill(source.memory)
        with source.agent.serving():
            reads = [
                target.agent.read(source.agent.address, [n * PIECE], [n * PIECE], PIECE) for n in range(64)
            ]
            await asyncio.gather(*reads)
        assert target.memory[: 64 * PIECE] == source.memory[: 64 * PIECE]

    within(body)


def test_checksums_are_alike_at_both_ends_and_tell_bytes_apart(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        fill(source.memory)
        target.memory[:] = source.memory
        target.memory[PIECE] ^= 1
        offsets = [0, PIECE, 2 * PIECE]
        sent = await source.agent.checksums(offsets, PIECE)
        arrived = await target.agent.checksums(offsets, PIECE)
        assert [a == b for a, b in zip(sent, arrived, strict=True)] == [True, False, True]

    within(body)


def test_a_peer_that_is_gone_fails_the_read_and_not_the_reader(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        fill(source.memory)
        gone = source.agent.address
        with source.agent.serving():
            await target.agent.read(gone, [0], [0], PIECE)
            await source.kill()
            with pytest.raises(ReadFailed):
                async with asyncio.timeout(60.0):
                    await target.agent.read(gone, [PIECE], [PIECE], PIECE)
            await source.stands()
            await target.stands()
            assert source.agent.address != gone
            await target.agent.read(source.agent.address, [PIECE], [PIECE], PIECE)
        assert target.memory[: 2 * PIECE] == source.memory[: 2 * PIECE]

    within(body)


def test_a_peer_that_does_not_answer_can_be_given_up_and_writes_no_more(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        fill(source.memory)
        pieces = [n * PIECE for n in range(SIZE // PIECE)]
        read = asyncio.create_task(target.agent.read(source.agent.address, pieces, pieces, PIECE))
        await asyncio.sleep(0.05)  # nobody serves
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        read.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # from process to process nobody has to answer
            await read
        assert loop.time() - began_s < 15.0
        target.memory[:] = bytes(SIZE)
        with source.agent.serving():
            await asyncio.sleep(0.3)
        assert not any(target.memory)

    within(body)


def test_what_is_outside_of_the_memories_is_not_read(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        for ours, theirs in ((0, SIZE - PIECE + 1), (SIZE - PIECE + 1, 0), (0, -PIECE), (-PIECE, 0)):
            with source.agent.serving(), pytest.raises(ReadFailed):
                await target.agent.read(source.agent.address, [ours], [theirs], PIECE)
            await target.stands()

    within(body)


@pytest.mark.parametrize("address", [b"\x00", b"nonsense", b"\x84\xa7version\xa51.5.1"])
def test_what_is_no_address_fails(within: Within, address: bytes) -> None:
    async def body(source: End, target: End) -> None:
        with pytest.raises(ReadFailed):
            await target.agent.read(address, [0], [0], PIECE)

    within(body)


def test_a_closed_agent_reads_no_more(within: Within) -> None:
    async def body(source: End, target: End) -> None:
        await target.agent.close()
        await target.agent.close()
        with source.agent.serving(), pytest.raises(ReadFailed):
            await target.agent.read(source.agent.address, [0], [0], PIECE)

    within(body)


@NEEDS_NIXL
def test_nixl_listens_on_a_network_only_where_it_is_asked_for() -> None:
    host = next(
        (
            address.address
            for name, addresses in psutil.net_if_addrs().items()
            for address in addresses
            if address.family is socket.AF_INET and not address.address.startswith("127.")
        ),
        None,
    )
    if host is None:
        pytest.skip("this machine has no network interface but loopback")

    async def main() -> None:
        memory = SharedMemory(SIZE)
        try:
            with pytest.raises(AgentUnavailable, match=r"lets in whoever reaches it at .*--connector nixl"):
                await open_nixl(memory.path, SIZE, f"{host}:0")
            agent = await open_nixl(memory.path, SIZE, f"{host}:0", open_to_network=True)
            assert agent.address
            await agent.close()
        finally:
            memory.close()

    asyncio.run(main())
