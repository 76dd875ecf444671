"""What `world/network.py` promises, held against real sockets and the simulated network alike."""

from __future__ import annotations

import asyncio
import errno
import functools
import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest

from headrace.world import ConnectFailed, Connection, ConnectionLost, Handler, Listener

MIB = 1024 * 1024


def in_every_place(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def test(place) -> None:
        place.play(scenario)

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


async def ignore(connection: Connection) -> None:
    """A handler that keeps its connection and does nothing with it until it is lost or ended."""
    while await connection.read(65536):
        pass


class Accepted:
    """A handler that gives the test its connection and lives until `release`."""

    def __init__(self) -> None:
        self._connection: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._released = asyncio.Event()

    async def __call__(self, connection: Connection) -> None:
        self._connection.set_result(connection)
        await self._released.wait()

    async def connection(self) -> Connection:
        return await self._connection

    def release(self) -> None:
        self._released.set()


async def connected(stage) -> tuple[Connection, Connection, Callable[[], Awaitable[None]]]:
    """The two ends of one connection (client's, server's), and what ends everything."""
    accepted = Accepted()
    listener = await stage.server.listen(stage.address, accepted)
    client = await stage.client.connect(listener.address, timeout_s=5)
    server = await accepted.connection()

    async def end() -> None:
        client.abort()
        accepted.release()
        await client.close()
        await server.close()
        await listener.close()

    return client, server, end


async def write_until_lost(connection: Connection) -> ConnectionLost:
    with pytest.raises(ConnectionLost) as raised:
        while True:
            connection.write(b"x")
            await connection.drain()
            await asyncio.sleep(0.01)
    return raised.value


async def read_all(connection: Connection) -> bytes:
    pieces = []
    while piece := await connection.read(65536):
        pieces.append(piece)
    return b"".join(pieces)


async def until_still(count: Callable[[], int]) -> int:
    """Wait until a number that only grows has stopped growing."""
    seen, still = -1, 0
    while still < 4:
        await asyncio.sleep(0.03)
        still = still + 1 if count() == seen else 0
        seen = count()
    return seen


@in_every_place
async def test_bytes_arrive_whole_and_in_order_both_ways(stage) -> None:
    client, server, end = await connected(stage)

    async def send(connection: Connection, data: bytes, chance: random.Random) -> None:
        position = 0
        while position < len(data):
            size = chance.choice([1, 3, 100, 5_000, 100_000])
            connection.write(data[position : position + size])
            position += size
            if chance.random() < 0.5:
                await connection.drain()
        connection.write_eof()

    async def receive(connection: Connection, chance: random.Random) -> bytes:
        received = bytearray()
        while True:
            if chance.random() < 0.3 and len(received) < MIB:
                received += await connection.read_exactly(chance.randint(0, 50_000))
            elif piece := await connection.read(chance.choice([1, 100, 70_000])):
                received += piece
            else:
                return bytes(received)

    there, back = random.Random(1).randbytes(2 * MIB), random.Random(2).randbytes(2 * MIB)
    got = await asyncio.gather(
        receive(client, random.Random(3)),
        receive(server, random.Random(4)),
        send(client, there, random.Random(5)),
        send(server, back, random.Random(6)),
    )
    assert got[0] == back
    assert got[1] == there
    await end()


@in_every_place
async def test_written_memory_may_be_reused_at_once(stage) -> None:
    client, server, end = await connected(stage)
    memory = bytearray(b"a" * (8 * MIB))
    client.write(memoryview(memory))
    memory[:] = b"b" * len(memory)
    assert await server.read_exactly(len(memory)) == b"a" * len(memory)
    await end()


@in_every_place
async def test_a_stalled_reader_stops_the_writer_until_it_reads_again(stage) -> None:
    client, server, end = await connected(stage)
    goal, chunk = 2 * stage.buffer_bound, bytes(65536)
    written = 0

    async def write() -> None:
        nonlocal written
        while written < goal:
            client.write(chunk)
            written += len(chunk)
            await client.drain()
        client.write_eof()

    writer = asyncio.create_task(write())
    stopped_at = await until_still(lambda: written)
    assert 0 < stopped_at <= stage.buffer_bound
    assert not writer.done()
    total = 0
    while piece := await server.read(MIB):
        total += len(piece)
    await writer
    assert total == written >= goal
    await end()


@in_every_place
async def test_each_side_ends_its_stream_on_its_own(stage) -> None:
    client, server, end = await connected(stage)
    client.write(b"question")
    client.write_eof()
    client.write_eof()
    assert await read_all(server) == b"question"
    assert await server.read(10) == b""
    with pytest.raises(RuntimeError, match="write_eof"):
        client.write(b"more")
    server.write(b"answer" * 10_000)
    await server.drain()
    assert await client.read_exactly(60_000) == b"answer" * 10_000
    server.write_eof()
    assert await client.read(10) == b""
    await asyncio.gather(client.close(), server.close())
    await end()


@in_every_place
async def test_a_stream_that_ends_early_says_what_there_was(stage) -> None:
    client, server, end = await connected(stage)
    client.write(b"abc")
    client.write_eof()
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await server.read_exactly(10)
    assert raised.value.partial == b"abc"
    assert raised.value.expected == 10
    assert await server.read_exactly(0) == b""
    await end()


@in_every_place
async def test_what_is_here_can_be_taken_at_once_and_nothing_else(stage) -> None:
    client, server, end = await connected(stage)
    assert server.take(1) is None
    client.write(b"abcdefg")
    assert await server.read_exactly(2) == b"ab"
    assert server.take(3) == b"cde"
    assert server.take(3) is None, "and takes no part of it"
    assert server.take(2) == b"fg"
    client.write(b"h")
    assert await server.read_exactly(1) == b"h"
    await end()


@in_every_place
async def test_close_delivers_what_was_written_and_then_ends(stage) -> None:
    client, server, end = await connected(stage)
    data = random.Random(7).randbytes(4 * MIB)
    server.write(data)
    closing = asyncio.create_task(server.close())
    assert await read_all(client) == data
    assert await client.read(1) == b""
    await client.close()
    await closing
    await end()


@in_every_place
async def test_close_loses_nothing_although_the_peer_is_still_sending(stage) -> None:
    """A socket closed with unread input is reset by its kernel, and the reset may overtake the last words."""
    client, server, end = await connected(stage)
    client.write(bytes(300_000))
    await server.read(1)
    server.write(b"goodbye" * 50_000)
    closing = asyncio.create_task(server.close())
    client.write(bytes(100_000))
    assert await read_all(client) == b"goodbye" * 50_000
    await client.close()
    await closing
    await end()


@in_every_place
async def test_close_waits_for_a_slow_reader_before_it_lingers(stage) -> None:
    client, server, end = await connected(stage)
    size = 2 * stage.buffer_bound
    server.write(bytes(size))
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0.3)  # longer than it would linger
    client.write(bytes(100_000))
    assert len(await read_all(client)) == size
    await client.close()
    await closing
    await end()


@in_every_place
async def test_close_ends_soon_although_the_peer_holds_on(stage) -> None:
    client, server, end = await connected(stage)
    async with asyncio.timeout(5):
        await server.close()
    assert await client.read(1) == b""
    loss = await write_until_lost(client)
    assert client.peer in str(loss)
    await end()


@in_every_place
async def test_after_close_this_side_is_told_that_it_closed(stage) -> None:
    client, _, end = await connected(stage)
    reading = asyncio.create_task(client.read(1))
    await asyncio.sleep(0)
    await asyncio.gather(client.close(), client.close())
    await client.close()
    with pytest.raises(ConnectionLost, match="closed on this side"):
        await reading
    for use in (lambda: client.read(1), lambda: client.read_exactly(1), client.drain):
        with pytest.raises(ConnectionLost, match="closed on this side"):
            await use()
    with pytest.raises(ConnectionLost, match="closed on this side"):
        client.write(b"x")
    await end()


@in_every_place
async def test_a_close_that_is_cancelled_aborts(stage) -> None:
    client, server, end = await connected(stage)
    client.write(bytes(2 * stage.buffer_bound))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.close()  # the server does not read
    await client.close()
    with pytest.raises(ConnectionLost if stage.resets else asyncio.IncompleteReadError):
        while True:
            await server.read_exactly(65536)
    await end()


@in_every_place
async def test_abort_is_learnt_on_both_sides(stage) -> None:
    client, server, end = await connected(stage)
    reading = asyncio.create_task(client.read(1))
    await asyncio.sleep(0)
    client.abort()
    client.abort()
    with pytest.raises(ConnectionLost, match="aborted on this side"):
        await reading
    with pytest.raises(ConnectionLost, match="aborted on this side"):
        client.write(b"x")
    with pytest.raises(ConnectionLost, match="aborted on this side"):
        await client.read(1)
    if stage.resets:
        with pytest.raises(ConnectionLost):
            await server.read(1)
        with pytest.raises(ConnectionLost):
            await server.read_exactly(1)
    else:
        assert await server.read(1) == b""
    await write_until_lost(server)
    await end()


@in_every_place
async def test_a_loss_wakes_everyone_who_drains(stage) -> None:
    client, server, end = await connected(stage)
    client.write(bytes(2 * stage.buffer_bound))
    drains = [asyncio.create_task(client.drain()) for _ in range(3)]
    await until_still(lambda: sum(task.done() for task in drains))
    assert not any(task.done() for task in drains)
    server.abort()
    for task in drains:
        with pytest.raises(ConnectionLost):
            await task
    await end()


@in_every_place
async def test_everyone_who_drains_goes_on_when_there_is_room(stage) -> None:
    client, server, end = await connected(stage)
    size = 2 * stage.buffer_bound
    client.write(bytes(size))
    drains = [asyncio.create_task(client.drain()) for _ in range(3)]
    await server.read_exactly(size)
    await asyncio.gather(*drains)
    await end()


async def kill_a_peer(stage, *, reads: bool) -> None:
    accepted = Accepted()
    listener = await stage.server.listen(stage.address, accepted)
    kill = await stage.start_peer(listener.address, reads=reads)
    connection = await accepted.connection()
    assert await connection.read_exactly(5) == b"ready"
    connection.write(b"x" * 100)
    reading = asyncio.create_task(connection.read(1))
    await asyncio.sleep(0.1)
    assert not reading.done()
    kill()
    try:
        assert await reading == b""  # its kernel may well end the stream in good order
    except ConnectionLost as loss:
        assert connection.peer in str(loss)
    await write_until_lost(connection)
    accepted.release()
    await listener.close()


@in_every_place
async def test_a_killed_peer_that_was_reading(stage) -> None:
    await kill_a_peer(stage, reads=True)


@in_every_place
async def test_a_killed_peer_that_had_unread_bytes(stage) -> None:
    await kill_a_peer(stage, reads=False)


@in_every_place
async def test_nobody_listens(stage) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(ConnectFailed) as raised:
            await stage.client.connect(stage.nowhere, timeout_s=30)
    assert stage.nowhere in str(raised.value)
    assert "nothing listens there" in str(raised.value)


@in_every_place
async def test_nobody_answers(stage) -> None:
    with ExitStack() as cleanup:
        address = stage.unanswered_address(cleanup)
        with pytest.raises(ConnectFailed, match=r"no answer within 0\.2 s"):
            await stage.client.connect(address, timeout_s=0.2)


@in_every_place
async def test_an_attempt_can_be_cancelled(stage) -> None:
    with ExitStack() as cleanup:
        address = stage.unanswered_address(cleanup)
        attempt = asyncio.create_task(stage.client.connect(address, timeout_s=30))
        await asyncio.sleep(0.05)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt


@in_every_place
async def test_closing_a_listener_ends_accepting_and_nothing_else(stage) -> None:
    client, server, end = await connected(stage)
    second = Accepted()
    again = await stage.server.listen(stage.address.replace("/listener", "/second"), second)
    await again.close()
    await again.close()
    with pytest.raises(ConnectFailed):
        await stage.client.connect(again.address, timeout_s=5)
    reopened = await stage.server.listen(again.address, second)
    late = await stage.client.connect(reopened.address, timeout_s=5)
    accepted = await second.connection()
    await reopened.close()
    for ours, theirs in ((client, server), (late, accepted)):
        ours.write(b"hello")
        assert await theirs.read_exactly(5) == b"hello"
    second.release()
    await late.close()
    await end()


@in_every_place
async def test_an_address_is_had_once(stage) -> None:
    listener: Listener = await stage.server.listen(stage.address, ignore)
    with pytest.raises(OSError) as raised:
        await stage.server.listen(listener.address, ignore)
    assert raised.value.errno == errno.EADDRINUSE
    assert listener.address in str(raised.value)
    await listener.close()


@in_every_place
async def test_many_connections_at_once(stage) -> None:
    count = 150

    async def echo(connection: Connection) -> None:
        while piece := await connection.read(4096):
            connection.write(piece)
            await connection.drain()

    listener = await stage.server.listen(stage.address, echo)

    async def talk(number: int) -> None:
        data = random.Random(number).randbytes(20_000)
        connection = await stage.client.connect(listener.address, timeout_s=10)
        for start in range(0, len(data), 1000):
            connection.write(data[start : start + 1000])
            await connection.drain()
        connection.write_eof()
        assert await read_all(connection) == data
        await connection.close()

    await asyncio.gather(*(talk(number) for number in range(count)))
    await listener.close()


@in_every_place
async def test_a_cancelled_read_loses_nothing(stage) -> None:
    client, server, end = await connected(stage)
    chance = random.Random(8)
    cancelled = 0
    for number in range(60):
        data = number.to_bytes(4, "big")
        reading = asyncio.create_task(server.read(4))
        await asyncio.sleep(0)
        client.write(data)
        for _ in range(chance.randrange(6)):  # cancel before, while and after the bytes arrive
            await asyncio.sleep(chance.choice([0, 0, stage.one_way_s]))
        reading.cancel()
        await asyncio.wait([reading])
        cancelled += reading.cancelled()
        got = b"" if reading.cancelled() else reading.result()
        assert got + await server.read_exactly(4 - len(got)) == data
    assert 0 < cancelled < 60
    reading = asyncio.create_task(server.read_exactly(10))
    client.write(b"abcde")
    await asyncio.sleep(3 * stage.one_way_s)
    reading.cancel()
    await asyncio.wait([reading])
    client.write(b"fghij")
    assert await server.read_exactly(10) == b"abcdefghij"
    await end()


@in_every_place
async def test_a_cancelled_drain_loses_nothing(stage) -> None:
    client, server, end = await connected(stage)
    size = 2 * stage.buffer_bound
    client.write(bytes(size))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.drain()
    client.write(b"last")
    await server.read_exactly(size)
    assert await server.read_exactly(4) == b"last"
    await client.drain()
    await end()


@in_every_place
async def test_two_readers_are_refused(stage) -> None:
    client, server, end = await connected(stage)
    first = asyncio.create_task(client.read(1))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await client.read(1)
    server.write(b"x")
    assert await first == b"x"
    await end()


@in_every_place
async def test_a_handler_that_returns_closes_its_connection(stage) -> None:
    async def greet(connection: Connection) -> None:
        connection.write(b"welcome")

    listener = await stage.server.listen(stage.address, greet)
    client = await stage.client.connect(listener.address, timeout_s=5)
    assert await read_all(client) == b"welcome"
    await client.close()
    await listener.close()


@in_every_place
async def test_a_handler_that_fails_is_reported_and_its_connection_dropped(stage) -> None:
    async def fail(connection: Connection) -> None:
        await connection.read(1)
        raise ZeroDivisionError("a defect")

    listener = await stage.server.listen(stage.address, fail)
    client = await stage.client.connect(listener.address, timeout_s=5)
    client.write(b"x")
    await write_until_lost(client)
    assert [type(report["exception"]) for report in stage.reports] == [ZeroDivisionError]
    assert "the connection with" in stage.reports.pop()["message"]
    await listener.close()


@in_every_place
async def test_a_handler_may_lose_its_own_connection_but_no_other(stage) -> None:
    handled = asyncio.Event()

    async def lose(connection: Connection) -> None:
        handled.set()
        await connection.read_exactly(2)

    async def lose_another(connection: Connection) -> None:
        handled.set()
        raise ConnectionLost("somebody else", "for a test")

    async def visit(handler: Handler, place: str) -> None:
        handled.clear()
        listener = await stage.server.listen(stage.address.replace("/listener", place), handler)
        client = await stage.client.connect(listener.address, timeout_s=5)
        await handled.wait()
        client.write(b"x")
        await asyncio.sleep(2 * stage.one_way_s)
        client.abort()
        await client.close()
        await listener.close()

    if stage.resets:
        await visit(lose, "/one")
        await asyncio.sleep(0.05)
        assert not stage.reports
    await visit(lose_another, "/two")
    assert [str(report["exception"]) for report in stage.reports] == [
        "connection with somebody else lost: for a test"
    ]
    stage.reports.clear()


@in_every_place
async def test_bad_addresses_and_sizes_are_refused(stage) -> None:
    for bad in (
        "",
        "nohost",
        ":80",
        "host:",
        "host:80x",
        "host:70000",
        "host:-1",
        "::1:80",
        "unix:",
        "host:٣",
    ):
        with pytest.raises(ValueError, match="address"):
            await stage.client.connect(bad, timeout_s=1)
        with pytest.raises(ValueError, match="address"):
            await stage.server.listen(bad, ignore)
    client, _, end = await connected(stage)
    for use in (functools.partial(client.read, 0), functools.partial(client.read_exactly, -1)):
        with pytest.raises(ValueError, match="bytes"):
            await use()
    await end()
