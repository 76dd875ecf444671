"""Channels: typed messages arrive whole and in order, or are refused with the peer and the reason."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.protocol.channel import MAX_FRAME_BYTES, Channel, ProtocolError
from headrace.sim import LinkProfile, Simulation, run
from headrace.world import Connection, ConnectionLost, real_world


class Text(msgspec.Struct, tag=True, frozen=True):
    body: str
    number: int = 0


class Blob(msgspec.Struct, tag=True, frozen=True):
    data: bytes


class Bounded(msgspec.Struct, tag=True, frozen=True):
    anything: Any = None
    positive: int = 1

    def __post_init__(self) -> None:
        if self.positive < 1:
            raise ValueError("positive must be at least 1")


class Stranger(msgspec.Struct, tag=True, frozen=True):
    body: str


Message = Text | Blob | Bounded

messages = st.one_of(
    st.builds(Text, st.text(max_size=50), st.integers(-(1 << 63), (1 << 64) - 1)),
    st.builds(Blob, st.binary(max_size=300)),
    st.builds(
        Bounded, st.recursive(st.none() | st.integers(-9, 9), lambda inner: st.lists(inner, max_size=3))
    ),
)


def on_a_connection(
    scenario: Callable[[Connection, Connection], Awaitable[None]], *, seed: int = 0, **options: Any
) -> None:
    """Run a scenario on the two ends of a simulated connection, client's and server's."""

    async def main(simulation: Simulation) -> None:
        accepted: asyncio.Queue[Connection] = asyncio.Queue()

        async def handler(connection: Connection) -> None:
            accepted.put_nowait(connection)
            await asyncio.sleep(1e9)

        await simulation.world("server").network.listen("server:1", handler)
        client = await simulation.world("client").network.connect("server:1", timeout_s=1)
        await scenario(client, await accepted.get())

    run(main, seed=seed, max_virtual_s=1e6, **options)


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=20), st.lists(messages, max_size=20), st.integers(0, 1000))
def test_what_is_sent_arrives_in_order_both_ways(
    there: list[Message], back: list[Message], seed: int
) -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        async def exchange(connection: Connection, sent: list[Message]) -> list[Message]:
            channel: Channel[Message] = Channel(connection, receives=Message)
            for number, message in enumerate(sent):
                channel.post(message) if number % 3 else await channel.send(message)
            connection.write_eof()
            received = []
            while (message := await channel.receive()) is not None:
                received.append(message)
            assert await channel.receive() is None
            await channel.close()
            return received

        got = await asyncio.gather(exchange(client, there), exchange(server, back))
        assert got == [back, there]

    on_a_connection(scenario, seed=seed, link=LinkProfile(jitter_s=0.01), window_bytes=500)


def test_a_frame_is_a_length_and_that_much_msgpack() -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        Channel(client, receives=Message).post(Text("hi", 5))
        raw = await server.read_exactly(4)
        body = await server.read_exactly(int.from_bytes(raw, "big"))
        assert msgspec.msgpack.decode(body) == {"type": "Text", "body": "hi", "number": 5}

    on_a_connection(scenario)


def test_a_large_message_and_back_pressure() -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        sender, receiver = Channel(client, receives=Text), Channel(server, receives=Message)
        blob = Blob(bytes(8 << 20))
        sending = asyncio.create_task(sender.send(blob))
        await asyncio.sleep(100)
        assert not sending.done()
        assert await receiver.receive() == blob
        await sending

    on_a_connection(scenario)


def test_a_cancelled_receive_loses_nothing() -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        sender, receiver = Channel(client, receives=Text), Channel(server, receives=Message)
        body = "x" * 1000
        encoded = frame(msgspec.msgpack.encode(Text(body)))
        for cut in (0, 1, 3, 4, 5, 500):
            receiving = asyncio.create_task(receiver.receive())
            client.write(encoded[:cut])
            await asyncio.sleep(1)
            receiving.cancel()
            await asyncio.wait([receiving])
            assert receiving.cancelled()
            client.write(encoded[cut:])
            assert await receiver.receive() == Text(body)
        sender.post(Text("next"))
        assert await receiver.receive() == Text("next")

    on_a_connection(scenario)


MAP = b"\x82\xa4type\xa7Bounded"
REFUSED = {
    "another type": (frame(msgspec.msgpack.encode(Stranger("hello"))), "Invalid value 'Stranger'"),
    "no tag": (frame(msgspec.msgpack.encode({"body": "x"})), "missing required field `type`"),
    "not a message": (frame(msgspec.msgpack.encode([1, 2])), "Expected `object`, got `array`"),
    "wrong field type": (
        frame(msgspec.msgpack.encode({"type": "Text", "body": 7})),
        r"Expected `str`, got `int`",
    ),
    "a field is missing": (frame(msgspec.msgpack.encode({"type": "Blob"})), "missing required field `data`"),
    "a check fails": (frame(MAP + b"\xa8positive\x00"), "positive must be at least 1"),
    "empty": (frame(b""), "a frame of 0 bytes"),
    "more than a message": (frame(msgspec.msgpack.encode(Text("x")) + b"\x00"), "trailing"),
    "half a message": (frame(msgspec.msgpack.encode(Text("x"))[:-1]), "truncated"),
    "reserved byte": (frame(b"\xc1"), "malformed"),
    "bad utf-8": (frame(b"\x82\xa4type\xa4Text\xa4body\xa2\xff\xfe"), "utf-8"),
    "far too deep": (frame(MAP + b"\xa8anything" + b"\x91" * 100_000 + b"\x00"), "recursion"),
    "an array larger than memory": (frame(MAP + b"\xa8anything\xdd\xff\xff\xff\xff"), "truncated"),
    "a map larger than memory": (frame(MAP + b"\xa8anything\xdf\xff\xff\xff\xff"), "truncated"),
    "unhashable key": (frame(MAP + b"\xa8anything\x81\x80\x00"), "hashable"),
    "pickle": (frame(pickle.dumps(Text("x"))), "no expected message"),
    "too long": (
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        "a frame of 67108865 bytes, the limit is 67108864",
    ),
    "far too long": (b"\xff" * 100, "a frame of 4294967295 bytes, the limit is 67108864"),
}


@pytest.mark.parametrize(("sent", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_and_ends_the_channel(sent: bytes, reason: str) -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        receiver: Channel[Message] = Channel(server, receives=Message)
        client.write(frame(msgspec.msgpack.encode(Text("fine"))) + sent)
        assert await receiver.receive() == Text("fine")
        with pytest.raises(ProtocolError, match=reason) as raised:
            await receiver.receive()
        assert raised.value.peer == server.peer
        assert f"channel with {server.peer}: " in str(raised.value)
        with pytest.raises(ConnectionLost):
            await receiver.receive()
        with pytest.raises(ConnectionLost):
            receiver.post(Text("more"))
        with pytest.raises(ConnectionLost):
            await client.read(1)

    on_a_connection(scenario)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_protocol_error(body: bytes) -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        client.write(frame(body))
        try:
            assert isinstance(await Channel(server, receives=Message).receive(), Message)
        except ProtocolError as error:
            assert error.peer == server.peer

    on_a_connection(scenario)


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 8])
def test_a_stream_that_ends_inside_a_frame_is_no_clean_end(keep: int) -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        encoded = frame(msgspec.msgpack.encode(Text("x")))
        client.write(encoded[:keep])
        client.write_eof()
        part = f"{keep} of 4 bytes of a frame's length"
        if keep >= 4:
            part = f"{keep - 4} of {len(encoded) - 4} bytes of a frame's body"
        with pytest.raises(ProtocolError, match=part):
            await Channel(server, receives=Message).receive()

    on_a_connection(scenario)


def test_the_limit_holds_to_the_byte_both_ways() -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        sender = Channel(client, receives=Text, max_frame_bytes=100)
        receiver: Channel[Blob] = Channel(server, receives=Blob, max_frame_bytes=100)
        overhead = len(msgspec.msgpack.encode(Blob(bytes(50)))) - 50
        fits, too_long = Blob(bytes(100 - overhead)), Blob(bytes(101 - overhead))
        with pytest.raises(ProtocolError, match="a Blob of 101 bytes is not sent, the limit is 100"):
            sender.post(too_long)
        await sender.send(fits)
        assert await receiver.receive() == fits
        client.write(frame(msgspec.msgpack.encode(too_long)))
        with pytest.raises(ProtocolError, match="a frame of 101 bytes, the limit is 100"):
            await receiver.receive()

    on_a_connection(scenario)


def test_a_loss_is_a_loss() -> None:
    async def scenario(client: Connection, server: Connection) -> None:
        sender, receiver = Channel(client, receives=Text), Channel(server, receives=Text)
        assert sender.peer == client.peer
        receiving = asyncio.create_task(receiver.receive())
        await asyncio.sleep(1)
        sender.abort()
        with pytest.raises(ConnectionLost):
            await receiving
        with pytest.raises(ConnectionLost):
            await receiver.send(Text("x"))

    on_a_connection(scenario)


def test_a_channel_is_made_for_types_that_can_be_told_apart() -> None:
    class Untagged(msgspec.Struct):
        body: str

    async def scenario(client: Connection, server: Connection) -> None:
        with pytest.raises(TypeError, match="tag"):
            Channel(client, receives=Text | Untagged)
        for limit in (0, 1 << 32):
            with pytest.raises(ValueError, match="max_frame_bytes"):
                Channel(client, receives=Text, max_frame_bytes=limit)

    on_a_connection(scenario)


def test_messages_over_a_real_socket() -> None:
    async def main() -> None:
        world = real_world()

        async def echo(connection: Connection) -> None:
            channel: Channel[Message] = Channel(connection, receives=Message)
            while (message := await channel.receive()) is not None:
                await channel.send(message)

        listener = await world.network.listen("127.0.0.1:0", echo)
        channel: Channel[Message] = Channel(
            await world.network.connect(listener.address, timeout_s=5), receives=Message
        )
        sent = [Text("hello", 1), Blob(bytes(3 << 20)), Bounded([1, [2]])]
        for message in sent:
            channel.post(message)
        assert [await channel.receive() for _ in sent] == sent
        await channel.close()
        await listener.close()

    asyncio.run(main())
