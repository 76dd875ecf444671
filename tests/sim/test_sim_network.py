"""The simulated network's own promises: time, bandwidth, and what each fault looks like to each side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from headrace.sim import Crash, LinkProfile, Simulation, run
from headrace.world import ConnectFailed, Connection, ConnectionLost

TIMEOUT_S = 30
EXACT = LinkProfile(latency_s=1.0, jitter_s=0.0, bytes_per_s=1e6)
"""A second each way, no chance: times can be computed."""


class Pair:
    """A connection from host `a` to host `b`, and what each end has read so far."""

    def __init__(self, simulation: Simulation) -> None:
        self.network = simulation.network
        self.worlds = {name: simulation.world(name) for name in ("a", "b")}
        self._accepted: asyncio.Queue[Connection] = asyncio.Queue()

    async def open(self) -> None:
        async def handler(connection: Connection) -> None:
            self._accepted.put_nowait(connection)
            await asyncio.sleep(1e9)

        self.listener = await self.worlds["b"].network.listen("b:7000", handler)
        await self.reopen()

    async def reopen(self) -> None:
        self.a = await self.worlds["a"].network.connect("b:7000", timeout_s=1000)
        self.b = await self._accepted.get()


class Reader:
    """Reads a connection to its end, and keeps what came, when, and how it ended."""

    def __init__(self, connection: Connection) -> None:
        self.data = bytearray()
        self.times: list[float] = []
        self.ending: Exception | None = None
        self.task = asyncio.create_task(self._read(connection))

    async def _read(self, connection: Connection) -> None:
        try:
            while piece := await connection.read(1 << 20):
                self.data += piece
                self.times.append(asyncio.get_running_loop().time())
        except ConnectionLost as loss:
            self.ending = loss
        self.times.append(asyncio.get_running_loop().time())


def scenario(main: Callable[[Pair], Awaitable[None]] | None = None, **options: Any) -> Callable[..., Any]:
    """A test that is run with several seeds, on a pair of connected hosts."""

    def wrap(main: Callable[[Pair], Awaitable[None]]) -> Callable[[int], None]:
        @pytest.mark.parametrize("seed", options.pop("seeds", range(3)))
        def test(seed: int) -> None:
            async def play(simulation: Simulation) -> None:
                pair = Pair(simulation)
                await pair.open()
                await main(pair)

            run(play, seed=seed, retransmission_timeout_s=TIMEOUT_S, max_virtual_s=10_000, **options)

        test.__name__, test.__doc__ = main.__name__, main.__doc__
        return test

    return wrap(main) if main is not None else wrap


def now() -> float:
    return asyncio.get_running_loop().time()


async def lost(action: Callable[[], Awaitable[object]]) -> str:
    with pytest.raises(ConnectionLost) as raised:
        await action()
    return raised.value.reason


# Time and bandwidth.


@scenario(link=EXACT, seeds=[0])
async def test_bytes_take_latency_and_bandwidth(pair: Pair) -> None:
    assert now() == pytest.approx(3)  # asked, answered, completed
    began = now()
    pair.a.write(b"x" * 100_000)
    await pair.b.read_exactly(100_000)
    assert now() - began == pytest.approx(1.1)
    pair.b.write(b"y")
    await pair.a.read_exactly(1)
    assert now() - began == pytest.approx(2.1, abs=1e-4)


@scenario(link=EXACT, window_bytes=1 << 20, seeds=[0])
async def test_connections_share_the_bandwidth_of_their_link(pair: Pair) -> None:
    first = pair.a, pair.b
    await pair.reopen()
    readers = [Reader(end) for end in (first[1], pair.b)]
    began = now()
    for end in (first[0], pair.a):
        end.write(bytes(500_000))
    pair.b.write(b"the other direction is free")
    await pair.a.read_exactly(27)
    assert now() - began == pytest.approx(1, abs=0.001)
    await asyncio.sleep(2)
    assert max(reader.times[-1] for reader in readers) - began == pytest.approx(2.0, abs=0.001)


@scenario(link=EXACT, window_bytes=100_000, seeds=[0])
async def test_a_window_limits_what_is_under_way(pair: Pair) -> None:
    reader = Reader(pair.b)
    began = now()
    pair.a.write(bytes(250_000))
    pair.a.write_eof()
    await reader.task
    # Each window of 0.1 s of bytes takes a round trip of 2 s until there is room for the next.
    assert reader.times[-1] - began == pytest.approx(2 * 2 + 1, abs=0.25)


@scenario(link=LinkProfile(latency_s=0.01, jitter_s=0.05))
async def test_jitter_does_not_reorder_a_stream(pair: Pair) -> None:
    reader = Reader(pair.b)
    data = random.Random(1).randbytes(20_000)
    for start in range(0, len(data), 50):
        pair.a.write(data[start : start + 50])
        await asyncio.sleep(0.001)
    pair.a.write_eof()
    await reader.task
    assert reader.data == data
    assert len(set(reader.times)) > 20


@scenario
async def test_a_stream_is_cut_where_it_pleases_the_seed(pair: Pair) -> None:
    firsts = set()
    for _ in range(100):
        pair.a.write(bytes(1000))
        first = await pair.b.read(1000)
        await pair.b.read_exactly(1000 - len(first))
        firsts.add(len(first))
    assert len(firsts) > 3
    assert 1000 in firsts


@scenario(link=EXACT, seeds=[0])
async def test_a_link_can_change(pair: Pair) -> None:
    pair.network.set_link("a", "b", LinkProfile(latency_s=5, jitter_s=0))
    began = now()
    pair.a.write(b"x")
    await pair.b.read(1)
    assert now() - began == pytest.approx(5)
    pair.b.write(b"y")
    await pair.a.read(1)
    assert now() - began == pytest.approx(6, abs=0.01)


def test_a_link_that_cannot_be_is_refused() -> None:
    for bad in ({"latency_s": -1}, {"jitter_s": -1}, {"bytes_per_s": 0}):
        with pytest.raises(ValueError, match="must"):
            LinkProfile(**bad)


# Partitions.


@scenario
async def test_a_partition_holds_bytes_and_healing_lets_them_flow(pair: Pair) -> None:
    there, back = Reader(pair.b), Reader(pair.a)
    pair.network.partition("a", "b")
    pair.a.write(b"from a")
    pair.b.write(b"from b")
    await asyncio.sleep(TIMEOUT_S - 1)
    assert not there.data
    assert not back.data
    pair.network.heal("a", "b")
    pair.a.write(b", and more")
    await asyncio.sleep(0.1)
    assert there.data == b"from a, and more"
    assert back.data == b"from b"
    await asyncio.sleep(10 * TIMEOUT_S)
    assert there.ending is back.ending is None


@scenario
async def test_a_long_partition_is_learnt_by_who_sends_and_by_nobody_else(pair: Pair) -> None:
    there, back = Reader(pair.b), Reader(pair.a)
    pair.network.partition("a", "b")
    pair.a.write(b"held")
    began = now()
    await back.task
    assert now() - began == pytest.approx(TIMEOUT_S, abs=0.01)
    assert "acknowledged for 30 s" in str(back.ending)
    with pytest.raises(ConnectionLost):
        pair.a.write(b"x")
    pair.network.heal("a", "b")
    await asyncio.sleep(10 * TIMEOUT_S)
    assert not there.task.done(), "who only reads never learns it"
    assert not there.data, "what was given up does not arrive later"
    pair.b.write(b"are you there?")
    await there.task
    assert "reset" in str(there.ending)


@scenario
async def test_a_one_way_partition_delivers_but_does_not_acknowledge(pair: Pair) -> None:
    pair.network.partition("b", "a", one_way=True)
    there, back = Reader(pair.b), Reader(pair.a)
    pair.a.write(b"arrives")
    await asyncio.sleep(1)
    assert there.data == b"arrives"
    pair.b.write(b"does not")
    await back.task
    assert isinstance(back.ending, ConnectionLost), "a knows nothing of the arrival, and gives up"
    await asyncio.sleep(2)
    assert isinstance(there.ending, ConnectionLost), "b has sent in vain"


@scenario
async def test_sending_more_does_not_put_off_the_time_out(pair: Pair) -> None:
    pair.network.partition("a", "b")
    began = now()
    with pytest.raises(ConnectionLost, match="acknowledged for 30 s"):
        while now() < began + 10 * TIMEOUT_S:
            pair.a.write(b"x")
            await asyncio.sleep(1)
    assert now() - began == pytest.approx(TIMEOUT_S, abs=1.1)


@scenario
async def test_progress_keeps_a_sender_alive(pair: Pair) -> None:
    reader = Reader(pair.b)
    for _ in range(20):
        pair.network.partition("a", "b")
        pair.a.write(b"x")
        await asyncio.sleep(TIMEOUT_S * 0.9)
        pair.network.heal("a", "b")
        await asyncio.sleep(0.001)
    pair.a.write_eof()
    await reader.task
    assert reader.data == b"x" * 20
    assert reader.ending is None


@scenario
async def test_a_slow_link_is_not_a_dead_one(pair: Pair) -> None:
    pair.network.set_link("a", "b", LinkProfile(bytes_per_s=1000))
    pair.a.write(bytes(200_000))
    pair.a.write_eof()
    began, total = now(), 0
    while piece := await pair.b.read(1 << 20):
        total += len(piece)
    assert total == 200_000
    assert now() - began == pytest.approx(200, abs=1)
    await asyncio.sleep(10 * TIMEOUT_S)
    await pair.a.drain()


@scenario
async def test_back_pressure_outlasts_the_time_out(pair: Pair) -> None:
    """A peer whose program does not read is alive: its machine answers."""
    pair.a.write(bytes(4 << 20))
    await asyncio.sleep(20 * TIMEOUT_S)
    assert len(await pair.b.read_exactly(4 << 20)) == 4 << 20


@scenario
async def test_connecting_waits_for_a_partition_to_heal(pair: Pair) -> None:
    for one_way in (("a", "b"), ("b", "a")):
        pair.network.partition(*one_way, one_way=True)
        with pytest.raises(ConnectFailed, match="no answer within 5 s"):
            await pair.worlds["a"].network.connect("b:7000", timeout_s=5)
        asyncio.get_running_loop().call_later(5, pair.network.heal, "a", "b")
        await pair.reopen()
        pair.a.write(b"hello")
        assert await pair.b.read_exactly(5) == b"hello"


# Breaks.


@scenario
async def test_a_break_reaches_both_sides_at_once_and_no_one_else(pair: Pair) -> None:
    old = pair.a, pair.b
    readers = [Reader(end) for end in old]
    world = pair.worlds["b"]
    pair.network.host("c")
    listener = await pair.network.host("c").listen("c:1", lambda connection: asyncio.sleep(1e9))
    other = await world.network.connect(listener.address, timeout_s=1)
    pair.network.break_connections("b", "a")
    began = now()
    await asyncio.gather(*(reader.task for reader in readers))
    assert now() == began
    for end in old:
        assert "broken on the way" in await lost(end.drain)
    other.write(b"x")
    await other.drain()
    await pair.reopen()
    pair.a.write(b"again")
    assert await pair.b.read_exactly(5) == b"again"


@pytest.mark.parametrize("cut", [0, 1, 2, 999, 1000, 1001, 65_535, 65_536, 65_537, 299_999, 300_000])
@pytest.mark.parametrize("seed", range(3))
def test_a_break_after_so_many_bytes(cut: int, seed: int) -> None:
    async def main(simulation: Simulation) -> None:
        pair = Pair(simulation)
        await pair.open()
        pair.a.write(b"before")
        await pair.b.read_exactly(6)
        there, back = Reader(pair.b), Reader(pair.a)
        simulation.network.break_connections("a", "b", after_bytes=cut)
        data = random.Random(cut).randbytes(300_000)
        pair.b.write(b"not counted")
        pair.a.write(data)
        await asyncio.gather(there.task, back.task)
        assert there.data == data[:cut]
        assert isinstance(there.ending, ConnectionLost)
        assert isinstance(back.ending, ConnectionLost)
        await pair.reopen()
        pair.a.write(data)
        assert await pair.b.read_exactly(len(data)) == data

    run(main, seed=seed)


@scenario(seeds=[0])
async def test_a_break_after_a_negative_number_of_bytes_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="negative"):
        pair.network.break_connections("a", "b", after_bytes=-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 99_999, 100_000, 299_999])
def test_a_corrupted_byte(place: int, seed: int) -> None:
    async def main(simulation: Simulation) -> None:
        pair = Pair(simulation)
        await pair.open()
        pair.a.write(b"before")
        await pair.b.read_exactly(6)
        simulation.network.corrupt("a", "b", after_bytes=place)
        pair.b.write(b"not counted")
        data = random.Random(place).randbytes(300_000)
        memory = [bytearray(100_000), bytearray(200_000)]
        sent, received = await asyncio.gather(
            pair.a.write_from([memoryview(data)[:100_000], memoryview(data)[100_000:]]),
            pair.b.read_into([memoryview(piece) for piece in memory]),
        )
        got = b"".join(memory)
        assert [i for i in range(len(data)) if got[i] != data[i]] == [place]
        assert [x == y for x, y in zip(sent, received, strict=True)] == [place >= 100_000, place < 100_000]
        pair.a.write(data)
        assert await pair.b.read_exactly(len(data)) == data, "it happens once"
        assert await pair.a.read_exactly(11) == b"not counted"

    run(main, seed=seed)


@scenario(seeds=[0])
async def test_corruption_before_the_first_byte_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="negative"):
        pair.network.corrupt("a", "b", after_bytes=-1)


@pytest.mark.parametrize("cut", [1, 65_537, 99_999, 150_000])
def test_a_break_in_the_middle_of_bulk_bytes_leaves_what_came(cut: int) -> None:
    async def main(simulation: Simulation) -> None:
        pair = Pair(simulation)
        await pair.open()
        simulation.network.break_connections("a", "b", after_bytes=cut)
        memory = bytearray(200_000)
        writing = asyncio.create_task(pair.a.write_from([memoryview(b"\1" * 400_000)]))
        with pytest.raises(ConnectionLost):
            await pair.b.read_into([memoryview(memory)])
        with pytest.raises(ConnectionLost):
            await writing
        assert memory == b"\1" * cut + bytes(len(memory) - cut)

    run(main, seed=cut)


@scenario
async def test_bulk_bytes_wait_for_the_end_of_a_partition(pair: Pair) -> None:
    memory = bytearray(600_000)
    pair.network.partition("a", "b")
    writing = asyncio.create_task(pair.a.write_from([memoryview(b"\1" * len(memory))]))
    reading = asyncio.create_task(pair.b.read_into([memoryview(memory)]))
    await asyncio.sleep(TIMEOUT_S / 2)
    assert not writing.done()
    assert not any(memory)
    pair.network.heal("a", "b")
    assert await reading == await writing
    assert all(memory)


@scenario(link=EXACT)
async def test_bulk_bytes_take_the_link_s_time(pair: Pair) -> None:
    memory = bytearray(200_000)
    began = now()
    await asyncio.gather(
        pair.a.write_from([memoryview(bytes(len(memory)))]), pair.b.read_into([memoryview(memory)])
    )
    assert now() - began == pytest.approx(1.2, abs=0.01)


# Crashes.


@scenario
async def test_a_crash_resets(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.crash_host("b")
    await reader.task
    assert "reset by the peer" in str(reader.ending)
    with pytest.raises(ConnectFailed, match="nothing listens there"):
        await pair.worlds["a"].network.connect("b:7000", timeout_s=5)
    assert "its host crashed" in await lost(pair.b.drain)


@scenario
async def test_a_crash_may_look_like_a_good_end(pair: Pair) -> None:
    pair.b.write(b"last words")
    pair.b.write(bytes(4 << 20))
    pair.network.crash_host("b", Crash.END)
    reader = Reader(pair.a)
    await reader.task
    assert reader.ending is None
    assert reader.data.startswith(b"last words")
    assert len(reader.data) < 4 << 20, "what the process still held died with it"
    pair.a.write(b"x")
    await asyncio.sleep(1)
    assert "reset by the peer" in await lost(pair.a.drain)


@scenario
async def test_a_silent_crash_is_learnt_by_time_out_only(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.crash_host("b", Crash.SILENT)
    with pytest.raises(ConnectFailed, match="no answer within 5 s"):
        await pair.worlds["a"].network.connect("b:7000", timeout_s=5)
    await asyncio.sleep(20 * TIMEOUT_S)
    assert not reader.task.done()
    pair.a.write(b"x")
    began = now()
    await reader.task
    assert now() - began == pytest.approx(TIMEOUT_S, abs=0.01)


@scenario
async def test_a_machine_that_comes_back_resets_what_it_does_not_know(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.crash_host("b", Crash.SILENT)
    pair.a.write(b"x")
    await asyncio.sleep(TIMEOUT_S / 2)
    pair.network.restart_host("b")
    await asyncio.sleep(0.1)
    assert "reset by the peer" in str(reader.ending)
    pair.worlds["b"] = type(pair.worlds["b"])(pair.network.host("b"), pair.worlds["b"].random)
    await pair.open()
    pair.a.write(b"hello")
    assert await pair.b.read_exactly(5) == b"hello"


@scenario
async def test_what_a_silent_machine_was_repeating_is_gone_for_good(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.partition("a", "b")
    pair.b.write(b"held")
    await asyncio.sleep(1)
    pair.network.crash_host("b", Crash.SILENT)
    pair.network.heal("a", "b")
    pair.network.restart_host("b")
    await asyncio.sleep(10 * TIMEOUT_S)
    assert not reader.data


@scenario
async def test_a_silent_machine_acknowledges_nothing_after_its_death(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.partition("b", "a", one_way=True)
    pair.a.write(b"arrives")
    await asyncio.sleep(1)
    pair.network.crash_host("b", Crash.SILENT)
    pair.network.restart_host("b")
    pair.network.heal("a", "b")
    await asyncio.sleep(TIMEOUT_S)
    assert isinstance(reader.ending, ConnectionLost)


@scenario
async def test_the_dead_can_do_nothing(pair: Pair) -> None:
    world = pair.worlds["b"]
    for how in Crash:
        pair.network.crash_host("b", how)
        with pytest.raises(RuntimeError, match="restart_host"):
            pair.network.host("b")
        for _ in range(2):
            with pytest.raises(ConnectFailed, match="host b has crashed"):
                await world.network.connect("a:1", timeout_s=1)
            with pytest.raises(OSError, match="host b has crashed"):
                await world.network.listen("b:1", lambda connection: asyncio.sleep(0))
            pair.network.restart_host("b")  # the old life stays dead
        world = type(world)(pair.network.host("b"), world.random)


@scenario
async def test_a_caller_that_dies_while_it_connects_leaves_nothing(pair: Pair) -> None:
    caller = asyncio.create_task(pair.worlds["a"].network.connect("b:7000", timeout_s=5))
    await asyncio.sleep(0)
    pair.network.crash_host("a")
    with pytest.raises(ConnectFailed):
        await caller
    assert pair._accepted.empty()
    assert not pair.network._ends


@scenario
async def test_a_reset_is_lost_in_a_partition(pair: Pair) -> None:
    reader = Reader(pair.a)
    pair.network.partition("a", "b")
    pair.b.abort()
    await asyncio.sleep(1)
    pair.network.heal("a", "b")
    await asyncio.sleep(20 * TIMEOUT_S)
    assert not reader.task.done()
    pair.a.write(b"x")
    await reader.task
    assert "reset by the peer" in str(reader.ending)


# Addresses and bookkeeping.


def test_the_trace_hash_sees_what_the_bytes_are() -> None:
    def traced(data: bytes) -> str:
        async def main(simulation: Simulation) -> None:
            pair = Pair(simulation)
            await pair.open()
            pair.a.write(data)
            await pair.b.read_exactly(len(data))

        return run(main).trace_hash

    assert traced(b"same size") == traced(b"same size") != traced(b"size same")


@scenario(seeds=[0])
async def test_a_host_listens_under_its_own_name(pair: Pair) -> None:
    with pytest.raises(OSError, match="this host is a"):
        await pair.worlds["a"].network.listen("b:1", lambda connection: asyncio.sleep(0))
    with pytest.raises(ConnectFailed, match="cannot be resolved"):
        await pair.worlds["a"].network.connect("nobody:1", timeout_s=1)
    for call in (pair.network.crash_host, pair.network.restart_host):
        with pytest.raises(ValueError, match="no host is called 'nobody'; there are a, b"):
            call("nobody")
    with pytest.raises(ValueError, match="no colon"):
        pair.network.host("a:1")


@scenario(seeds=[0])
async def test_a_host_reaches_itself_and_a_free_port_is_free(pair: Pair) -> None:
    own = pair.worlds["b"].network

    async def greet(connection: Connection) -> None:
        connection.write(connection.peer.encode())

    taken = await own.listen("b:49155", greet)
    listeners = [await own.listen("b:0", greet) for _ in range(5)]
    assert len({listener.address for listener in [*listeners, taken]}) == 6
    for listener in listeners:
        connection = await own.connect(listener.address, timeout_s=1)
        assert (await connection.read_exactly(4)).startswith(b"b:49")
        await connection.close()


@scenario
async def test_nothing_remains_of_connections_that_ended(pair: Pair) -> None:
    for end in (pair.a.close, pair.b.close):
        await end()
    for ending in ("close", "abort", "break"):
        await pair.reopen()
        pair.a.write(bytes(100_000))
        if ending == "close":
            await asyncio.gather(pair.a.close(), pair.b.close())
        elif ending == "abort":
            pair.a.abort()
        else:
            pair.network.break_connections("a", "b")
    await asyncio.sleep(1)
    assert not pair.network._ends
    assert all(not link._held for link in pair.network._links.values())
    loop = asyncio.get_running_loop()
    waiting = [timer for when, _, timer in loop._scheduled if not timer.cancelled() and when < 1e8]
    assert not waiting, "no timer outlives its connection"
