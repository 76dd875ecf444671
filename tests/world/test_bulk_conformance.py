"""What `world/network.py` promises of bulk bytes, held against real sockets and the simulated network."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
from test_network_conformance import connected, read_all, write_until_lost

from headrace.world import Connection, ConnectionLost

PLAIN = ["tcp-asyncio", "tcp-uvloop", "unix-asyncio", "unix-uvloop", "sim-near", "sim-far"]
MIB = 1 << 20


def in_places(places: Sequence[str]) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    def decorate(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        def test(place) -> None:
            place.play(scenario)

        test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
        return pytest.mark.parametrize("place", places, indirect=True)(test)

    return decorate


in_every_plain_place = in_places(PLAIN)


def views(buffers: Sequence[bytes | bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def let_go(held: Sequence[memoryview]) -> None:
    """Raises BufferError where somebody else has a hold on the memory still."""
    for view in held:
        view.release()


def empty_like(buffers: Sequence[bytes]) -> list[bytearray]:
    return [bytearray(len(buffer)) for buffer in buffers]


async def lost(call: Awaitable[object]) -> ConnectionLost:
    with pytest.raises(ConnectionLost) as raised:
        await call
    return raised.value


async def broken_off(stage, call: Awaitable[object]) -> None:
    """What a reader learns of an abort; unix sockets have no reset."""
    with pytest.raises(ConnectionLost if stage.resets else (ConnectionLost, asyncio.IncompleteReadError)):
        await call


def in_background(call: Awaitable[object]) -> asyncio.Task[object]:
    return asyncio.ensure_future(call)


async def under_way(stage, size: int) -> tuple:
    """A transfer in the middle of which both sides wait: the reader wants more than the writer has."""
    client, server, end = await connected(stage)
    memory = memoryview(bytearray(size))
    reading = in_background(server.read_into([memory]))
    await client.write_from(views([b"\1" * (size // 2)]))
    await asyncio.sleep(0.05 + 3 * stage.one_way_s)
    assert not reading.done()
    return client, server, end, memory, reading


@in_every_plain_place
async def test_buffers_arrive_between_ordinary_bytes_both_ways(stage) -> None:
    client, server, end = await connected(stage)
    chance = random.Random(1)
    sizes = [0, 1, 17, 100_003, 0, 368_640, 3 * MIB + 1, *[1000] * 150, 0]

    async def send(connection: Connection, buffers: list[bytes]) -> list[int]:
        connection.write(b"h" * 70_000)
        checksums = await connection.write_from(views(buffers[:4]))
        checksums += await connection.write_from(views(buffers[4:]))
        connection.write(b"tail")
        return checksums

    async def receive(connection: Connection, buffers: list[bytes], wait_s: float) -> list[int]:
        assert await connection.read_exactly(70_000) == b"h" * 70_000
        await asyncio.sleep(wait_s)  # so long, bytes arrive in the transport's way
        memory = empty_like(buffers)
        held = views(memory)
        checksums = await connection.read_into(held)
        let_go(held)
        assert memory == buffers
        assert await connection.read_exactly(4) == b"tail"
        return checksums

    there, back = [[chance.randbytes(size) for size in sizes] for _ in range(2)]
    results = await asyncio.gather(
        send(client, there), receive(server, there, 0.05), send(server, back), receive(client, back, 0.0)
    )
    assert results[0] == results[1]
    assert results[2] == results[3]
    assert len(set(results[0])) > 150
    client.write(b"and")
    assert await server.read(3) == b"and"
    await end()


@in_every_plain_place
async def test_checksums_are_of_each_buffer_alone(stage) -> None:
    client, server, end = await connected(stage)
    same = [b"abcdefghi" * 11_111] * 3
    sent = await client.write_from(views([*same, b"x" + same[0][1:], b""]))
    memory = empty_like([*same, same[0], b""])
    received = await server.read_into(views(memory))
    assert sent == received
    assert sent[0] == sent[1] == sent[2] != sent[3]
    assert sent[4] == 0
    assert await server.read_into([]) == await client.write_from([]) == []
    await end()


@in_every_plain_place
async def test_bytes_that_came_early_are_used_first_and_the_rest_is_left(stage) -> None:
    client, server, end = await connected(stage)
    client.write(b"0123456789" * 100)
    await asyncio.sleep(0.02 + 3 * stage.one_way_s)
    memory = [bytearray(3), bytearray(4)]
    await server.read_into(views(memory))
    assert memory == [b"012", b"3456"]
    assert await server.read_exactly(993) == (b"0123456789" * 100)[7:]
    await end()


@in_every_plain_place
async def test_a_stalled_reader_stops_the_bulk_writer_and_costs_no_processor_time(stage) -> None:
    client, server, end = await connected(stage)
    data = random.Random(2).randbytes(2 * stage.buffer_bound)
    writing = in_background(client.write_from(views([data])))
    await asyncio.sleep(0.3)
    assert not writing.done()
    before = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - before < 0.2
    assert not writing.done()
    memory = bytearray(len(data))
    assert await server.read_into(views([memory])) == await writing
    assert memory == data
    await end()


@in_every_plain_place
async def test_a_stream_that_ends_in_a_buffer(stage) -> None:
    client, server, end = await connected(stage)
    await client.write_from(views([b"a" * 300_000]))
    client.write_eof()
    memory = [bytearray(200_000), bytearray(200_000)]
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await server.read_into(views(memory))
    assert raised.value.expected == 400_000
    assert memory == [b"a" * 200_000, b"a" * 100_000 + bytes(100_000)]
    assert await server.read(1) == b""
    with pytest.raises(asyncio.IncompleteReadError):
        await server.read_into(views(memory))
    with pytest.raises(RuntimeError, match="after write_eof"):
        await client.write_from(views([b"more"]))
    assert await server.write_from(views([b"answer"]))
    assert await client.read_exactly(6) == b"answer"
    await end()


@in_every_plain_place
async def test_a_writer_that_aborts_is_learnt_by_the_bulk_reader(stage) -> None:
    client, server, end, memory, reading = await under_way(stage, MIB)
    client.abort()
    await broken_off(stage, reading)
    assert memory[: MIB // 2] == b"\1" * (MIB // 2)
    assert not any(memory[MIB // 2 :])
    let_go([memory])
    await write_until_lost(server)
    await end()


@in_every_plain_place
async def test_a_reader_that_aborts_is_learnt_by_the_bulk_writer(stage) -> None:
    client, server, end = await connected(stage)
    writing = in_background(client.write_from(views([bytes(2 * stage.buffer_bound)])))
    await server.read_into(views([bytearray(MIB)]))
    server.abort()
    await lost(writing)
    for use in (client.drain(), client.write_from([]), client.read_into(views([bytearray(1)]))):
        await lost(use)
    with pytest.raises(ConnectionLost):
        client.write(b"x")
    await end()


@in_every_plain_place
async def test_a_cancelled_read_into_leaves_the_memory_alone_and_drops_the_connection(stage) -> None:
    client, server, end = await connected(stage)
    writing = in_background(client.write_from(views([b"\1" * (2 * stage.buffer_bound)])))
    memory = bytearray(2 * stage.buffer_bound)
    held = views([memory])
    reading = in_background(server.read_into(held))
    while not memory[0]:
        await asyncio.sleep(stage.one_way_s)
    reading.cancel()
    asyncio.get_running_loop().call_soon(reading.cancel)  # whoever is impatient gets no shorter way
    with pytest.raises(asyncio.CancelledError):
        await reading
    seen = memory.count(1)
    let_go(held)
    await lost(writing)
    assert 0 < memory.count(1) == seen < len(memory)
    assert "aborted on this side" in str(await lost(server.read(1)))
    await end()


@in_every_plain_place
async def test_a_read_into_that_is_cancelled_while_it_waits(stage) -> None:
    _, server, end, memory, reading = await under_way(stage, MIB)
    reading.cancel()
    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await reading
    let_go([memory])
    await lost(server.read(1))
    await end()


@in_every_plain_place
async def test_a_cancelled_write_from_drops_the_connection(stage) -> None:
    client, server, end = await connected(stage)
    held = views([bytes(2 * stage.buffer_bound)])
    writing = in_background(client.write_from(held))
    await server.read_into(views([bytearray(MIB)]))
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    let_go(held)
    await broken_off(stage, server.read_into(views([bytearray(2 * stage.buffer_bound)])))
    assert "aborted on this side" in str(await lost(client.drain()))
    await end()


@in_every_plain_place
async def test_a_write_from_that_waits_for_earlier_bytes_can_be_cancelled(stage) -> None:
    client, server, end = await connected(stage)
    client.write(bytes(2 * stage.buffer_bound))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.write_from(views([b"x"]))
    await broken_off(stage, server.read_exactly(2 * stage.buffer_bound + 1))
    await end()


@in_every_plain_place
async def test_an_abort_by_another_task_ends_both_directions(stage) -> None:
    client, server, end = await connected(stage)
    held = views([bytearray(MIB), bytearray(2 * stage.buffer_bound)])
    reading = in_background(client.read_into(held[:1]))
    writing = in_background(client.write_from(held[1:]))
    await asyncio.sleep(0.1)
    client.abort()
    async with asyncio.timeout(2):
        for call in (reading, writing):
            assert "aborted on this side" in str(await lost(call))
    let_go(held)
    await broken_off(stage, server.read_exactly(2 * stage.buffer_bound))
    await end()


@in_every_plain_place
async def test_a_close_in_the_middle_of_a_write_is_an_abort(stage) -> None:
    client, server, end = await connected(stage)
    size = 2 * stage.buffer_bound
    writing = in_background(client.write_from(views([bytes(size)])))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        await client.close()
    await lost(writing)
    await broken_off(stage, server.read_into(views([bytearray(size)])))
    await end()


@in_every_plain_place
async def test_a_close_in_the_middle_of_a_read_ends_it(stage) -> None:
    client, server, end, memory, reading = await under_way(stage, MIB)
    closing = in_background(server.close())
    assert "closed on this side" in str(await lost(reading))
    let_go([memory])
    assert await read_all(client) == b""
    await client.close()
    await closing
    await end()


@in_every_plain_place
async def test_one_reader_and_nobody_beside_a_bulk_writer(stage) -> None:
    client, server, end, _, reading = await under_way(stage, MIB)
    for use in (server.read(1), server.read_exactly(1), server.read_into(views([bytearray(1)]))):
        with pytest.raises(RuntimeError, match="two tasks read"):
            await use
    writing = in_background(server.write_from(views([bytes(2 * stage.buffer_bound)])))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="while write_from sends"):
        await server.write_from(views([b"x"]))
    for refused in (lambda: server.write(b"x"), server.write_eof):
        with pytest.raises(RuntimeError, match="while write_from sends"):
            refused()
    await client.write_from(views([b"\2" * (MIB // 2)]))
    await reading
    await client.read_exactly(2 * stage.buffer_bound)
    await writing
    server.write(b"x")
    assert await client.read(1) == b"x"
    await end()


@in_every_plain_place
async def test_several_transfers_stall_without_holding_up_another(stage) -> None:
    """More than there are threads."""
    other_client, other_server, end = await connected(stage)
    stalled = []
    for number in range(6):
        accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        done = asyncio.Event()

        async def handler(connection: Connection, accepted=accepted, done=done) -> None:
            accepted.set_result(connection)
            await done.wait()

        listener = await stage.server.listen(stage.address.replace("/listener", f"/stalled{number}"), handler)
        client = await stage.client.connect(listener.address, timeout_s=5)
        server = await accepted
        stalled.append(
            (client, server, done, listener, in_background(server.read_into(views([bytearray(9)]))))
        )
    async with asyncio.timeout(5):
        writing = in_background(other_client.write_from(views([bytes(3 * MIB)])))
        await other_server.read_into(views([bytearray(3 * MIB)]))
        await writing
    for client, server, done, listener, reading in stalled:
        await client.write_from(views([b"123456789"]))
        await reading
        done.set()
        await asyncio.gather(client.close(), server.close())
        await listener.close()
    await end()


@in_places(["tls-asyncio", "tls-uvloop"])
async def test_bulk_bytes_are_refused_on_an_encrypted_connection(stage) -> None:
    client, server, end = await connected(stage)
    for use in (client.write_from(views([b"x"])), server.read_into(views([bytearray(1)]))):
        with pytest.raises(RuntimeError, match="plain=True"):
            await use
    client.write(b"unharmed")
    assert await server.read_exactly(8) == b"unharmed"
    await end()
