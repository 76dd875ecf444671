"""Who is let in, what refusals say, and what passes on the wire, under both event loops."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import uvloop
from certificates import copy, reissue

from headrace.world import ConnectFailed, Connection, ConnectionLost, Listener, Network, real_world
from headrace.world.credentials import Credentials, make_credentials
from headrace.world.streams import StreamNetwork


@pytest.fixture(params=[asyncio.SelectorEventLoop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run a scenario to its end, with nothing reported to the event loop."""

    def run(scenario: Callable[[], Awaitable[None]]) -> None:
        reports: list[dict[str, object]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
            async with asyncio.timeout(20):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())
        assert not reports

    return run


class Echo:
    """A handler that knows how many it has served."""

    def __init__(self) -> None:
        self.served = 0

    async def __call__(self, connection: Connection) -> None:
        self.served += 1
        while data := await connection.read(65536):
            connection.write(data)
            await connection.drain()


async def echoed(network: Network, address: str, data: bytes = b"hello", *, plain: bool = False) -> None:
    connection = await network.connect(address, timeout_s=5, plain=plain)
    connection.write(data)
    assert await connection.read_exactly(len(data)) == data
    await connection.close()


@asynccontextmanager
async def listening(
    network: Network, handler: Callable[[Connection], Awaitable[None]], *, plain: bool = False
) -> AsyncIterator[str]:
    listener: Listener = await network.listen("127.0.0.1:0", handler, plain=plain)
    try:
        yield listener.address
    finally:
        await listener.close()


@asynccontextmanager
async def relayed(address: str, change: Callable[[bytes], bytes | None]) -> AsyncIterator[str]:
    """A relay to `address`: what the client sends goes through `change`, whose None ends both streams."""
    outside = StreamNetwork()

    async def relay(client: Connection) -> None:
        server = await outside.connect(address, timeout_s=5)

        async def back() -> None:
            with suppress(ConnectionLost):
                while data := await server.read(65536):
                    client.write(data)

        returning = asyncio.create_task(back())
        with suppress(ConnectionLost):
            while (data := await client.read(65536)) and (changed := change(data)) is not None:
                server.write(changed)
        await server.close()
        await returning

    async with listening(outside, relay) as relay_address:
        yield relay_address


# Who is let in.


def test_a_cluster_talks_to_itself_and_the_real_world_passes_credentials_on(
    play, credentials: Credentials
) -> None:
    async def scenario() -> None:
        network = real_world(credentials).network
        echo = Echo()
        async with listening(network, echo) as address:
            await echoed(network, address, os.urandom(300_000))
        assert echo.served == 1

    play(scenario)


def forged(credentials: Credentials, tmp_path: Path, forge: Callable[[Path], object]) -> Credentials:
    """Credentials that nobody checked before they are used."""
    where = copy(credentials.directory, tmp_path / "forged")
    forge(where)
    return replace(credentials, directory=where)


def another_cluster(where: Path) -> None:
    other = make_credentials(where.parent / "other").directory
    for name in os.listdir(other):
        (other / name).rename(where / name)


def shown_by_another_cluster(where: Path) -> None:
    """Trusts whom it should, and shows a certificate of another authority."""
    other = make_credentials(where.parent / "other").directory
    for name in ("node.pem", "node.key"):
        (other / name).rename(where / name)


REFUSED_SERVERS = {
    "of another cluster": (another_cluster, "its certificate is not of this cluster's authority"),
    "of another authority": (shown_by_another_cluster, "its certificate is not of this cluster's authority"),
    "expired": (
        lambda where: reissue(where, from_days=-2, to_days=-1),
        "its certificate is refused: certificate has expired",
    ),
    "not yet valid": (
        lambda where: reissue(where, from_days=1, to_days=2),
        "its certificate is refused: certificate is not yet valid",
    ),
    "of another name": (
        lambda where: reissue(where, name="example.org"),
        "its certificate is refused: Hostname mismatch",
    ),
}


@pytest.mark.parametrize("server", REFUSED_SERVERS)
def test_a_server_that_is_refused(play, server: str, credentials: Credentials, tmp_path: Path) -> None:
    forge, reason = REFUSED_SERVERS[server]

    async def scenario() -> None:
        echo = Echo()
        async with listening(StreamNetwork(forged(credentials, tmp_path, forge)), echo) as address:
            with pytest.raises(ConnectFailed, match=reason) as raised:
                await StreamNetwork(credentials).connect(address, timeout_s=5)
            assert str(raised.value).startswith(f"cannot connect to {address}: ")
        assert echo.served == 0

    play(scenario)


REFUSED_CLIENTS = {
    "of another authority": (shown_by_another_cluster, "it refuses this side: unknown ca"),
    "expired": (
        lambda where: reissue(where, from_days=-2, to_days=-1),
        "it refuses this side: certificate expired",
    ),
    "of another name": (lambda where: reissue(where, name="example.org"), "goodbye"),
}


@pytest.mark.parametrize("client", REFUSED_CLIENTS)
def test_a_client_that_is_refused_learns_it_when_it_reads(
    play, client: str, credentials: Credentials, tmp_path: Path
) -> None:
    forge, reason = REFUSED_CLIENTS[client]

    async def scenario() -> None:
        echo = Echo()
        async with listening(StreamNetwork(credentials), echo) as address:
            network = StreamNetwork(forged(credentials, tmp_path, forge))
            connection = await network.connect(address, timeout_s=5)
            connection.write(b"x" * 100_000)
            with pytest.raises(ConnectionLost, match=reason):
                await connection.read(1)
            await connection.close()
            await echoed(StreamNetwork(credentials), address)
        assert echo.served == 1

    play(scenario)


def test_a_client_without_a_certificate_or_with_an_older_protocol(play, credentials: Credentials) -> None:
    class Nameless(Credentials):
        def client_context(self) -> ssl.SSLContext:
            return ssl.create_default_context(cafile=self.directory / "ca.pem")

    class Old(Credentials):
        def client_context(self) -> ssl.SSLContext:
            context = ssl.create_default_context(cafile=self.directory / "ca.pem")
            context.load_cert_chain(self.directory / "node.pem", self.directory / "node.key")
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            return context

    async def scenario() -> None:
        echo = Echo()
        async with listening(StreamNetwork(credentials), echo) as address:
            nameless = StreamNetwork(Nameless(credentials.directory, credentials.cluster_key))
            connection = await nameless.connect(address, timeout_s=5)
            with pytest.raises(ConnectionLost, match="it refuses this side: certificate required"):
                await connection.read(1)
            old = StreamNetwork(Old(credentials.directory, credentials.cluster_key))
            with pytest.raises(ConnectFailed, match="it refuses this side: protocol version"):
                await old.connect(address, timeout_s=5)
        assert echo.served == 0

    play(scenario)


def test_each_refusal_is_reported_once_for_each_peer(play, credentials: Credentials, tmp_path: Path) -> None:
    lines: list[str] = []
    stranger = make_credentials(tmp_path / "stranger")

    async def scenario() -> None:
        async with listening(StreamNetwork(credentials, lines.append), Echo()) as address:
            for _ in range(3):
                with pytest.raises(ConnectFailed):
                    await StreamNetwork(stranger).connect(address, timeout_s=5)
            for _ in range(2):
                plain = await StreamNetwork().connect(address, timeout_s=5)
                plain.write(b"GET / HTTP/1.1\r\n\r\n")
                while await plain.read(65536):
                    pass
                await plain.close()
            await echoed(StreamNetwork(credentials), address)

    play(scenario)
    assert [line.partition(" (")[0] for line in lines] == [
        "a connection from 127.0.0.1 was refused: it refuses this side: unknown ca",
        "a connection from 127.0.0.1 was refused: what it sends is not TLS 1.3",
    ]


# Who does not speak TLS.


def test_a_plain_client_is_not_served(play, credentials: Credentials) -> None:
    async def scenario() -> None:
        echo = Echo()
        async with listening(StreamNetwork(credentials), echo) as address:
            for words in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)):
                stranger = await StreamNetwork().connect(address, timeout_s=5)
                stranger.write(words)
                answer = b""
                while data := await stranger.read(65536):
                    answer += data
                assert len(answer) < 10  # an alert
                for _ in range(3):  # which no reset overtakes, though the stranger talks on
                    stranger.write(words)
                    await stranger.drain()
                    await asyncio.sleep(0.01)
                await stranger.close()
            await echoed(StreamNetwork(credentials), address)
        assert echo.served == 1

    play(scenario)


def test_a_server_without_tls(play, credentials: Credentials) -> None:
    async def greet(connection: Connection) -> None:
        connection.write(b"220 welcome\r\n")
        await connection.drain()
        await connection.read(65536)

    async def hang_up(connection: Connection) -> None:
        await connection.read(65536)

    async def keep_silent(connection: Connection) -> None:
        while await connection.read(65536):
            pass

    async def scenario() -> None:
        for handler, reason in (
            (greet, r"what it sends is not TLS 1\.3"),
            (hang_up, "it ended the connection during the TLS handshake"),
            (keep_silent, r"no TLS handshake within 0\.5 s"),
        ):
            async with listening(StreamNetwork(), handler) as address:
                with pytest.raises(ConnectFailed, match=reason):
                    await StreamNetwork(credentials).connect(address, timeout_s=0.5)

    play(scenario)


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["silent", "no TLS"])
def test_strangers_are_bounded_and_keep_nobody_out(
    play, words: bytes, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a file descriptor, whoever it is: the one that waited longest makes room for the next."""
    monkeypatch.setattr("headrace.world.tls.FAREWELL_S", 10.0)
    monkeypatch.setattr("headrace.world.streams.most_files", lambda: 256.0)
    most = 64
    lines: list[str] = []

    async def scenario() -> None:
        network = StreamNetwork(credentials, lines.append)
        async with listening(network, Echo()) as address:
            host, _, port = address.partition(":")

            def accepted() -> int:
                known = psutil.Process().net_connections("tcp4")
                return sum(c.laddr == (host, int(port)) and c.status != psutil.CONN_LISTEN for c in known)

            strangers = [await asyncio.open_connection(host, int(port)) for _ in range(3 * most)]
            for _, writer in strangers:
                with suppress(ConnectionError):
                    writer.write(words)
            deadline = time.monotonic() + 5.0
            while accepted() > most:
                assert time.monotonic() < deadline, accepted()
                await asyncio.sleep(0.02)
            await echoed(network, address)
            for _, writer in strangers:
                writer.close()

    play(scenario)
    assert "a connection from 127.0.0.1 was refused: 64 others wait to show who they are" in lines


def test_a_slow_handshake_ends_and_holds_up_nobody(
    play, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.world.tls.HANDSHAKE_S", 0.5)
    monkeypatch.setattr("headrace.world.tls.FAREWELL_S", 0.1)

    async def scenario() -> None:
        echo = Echo()
        network = StreamNetwork(credentials)
        async with listening(network, echo) as address:
            began = time.monotonic()
            silent = await StreamNetwork().connect(address, timeout_s=5)
            dripping = await StreamNetwork().connect(address, timeout_s=5)
            hello = client_hello(credentials)

            async def drip() -> None:
                for position in range(len(hello)):
                    dripping.write(hello[position : position + 1])
                    await dripping.drain()
                    await asyncio.sleep(0.02)

            dripper = asyncio.create_task(drip())
            await asyncio.gather(*(echoed(network, address) for _ in range(10)))
            assert time.monotonic() - began < 0.5, "this machine is too slow to tell"
            for stranger in (silent, dripping):
                with suppress(ConnectionLost):
                    assert await stranger.read(1) == b""
            assert 0.4 < time.monotonic() - began < 5
            with pytest.raises(ConnectionLost):  # read from for a moment, then reset
                await dripper
        assert echo.served == 10

    play(scenario)


def client_hello(credentials: Credentials) -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = credentials.client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="headrace")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_an_attempt_that_is_cancelled_in_its_handshake_leaves_the_peer(
    play, credentials: Credentials
) -> None:
    async def scenario() -> None:
        greeted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        left = asyncio.Event()

        async def keep_silent(connection: Connection) -> None:
            await connection.read(65536)
            greeted.set_result(connection)
            with suppress(ConnectionLost):
                await connection.read(65536)
            left.set()

        async with listening(StreamNetwork(), keep_silent) as address:
            attempt = asyncio.create_task(StreamNetwork(credentials).connect(address, timeout_s=10))
            await greeted
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            async with asyncio.timeout(5):  # sooner than the handshake's own limit
                await left.wait()

    play(scenario)


# What passes on the wire.


def test_what_is_encrypted_and_what_is_not(play, credentials: Credentials, tmp_path: Path) -> None:
    secret = b"in the dark" * 1000

    async def scenario() -> None:
        network = StreamNetwork(credentials)
        for plain in (False, True):
            seen = bytearray()

            def look(data: bytes, seen: bytearray = seen) -> bytes:
                seen += data
                return data

            async with listening(network, Echo(), plain=plain) as address, relayed(address, look) as between:
                await echoed(network, between, secret, plain=plain)
            assert len(seen) >= len(secret)
            assert (secret[:11] in seen) is plain
        listener = await network.listen(f"unix:{tmp_path}/socket", Echo())
        await echoed(StreamNetwork(), listener.address, secret)
        await listener.close()

    play(scenario)


def test_changed_bytes_are_a_loss(play, credentials: Credentials) -> None:
    async def scenario() -> None:
        told: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()

        async def receive(connection: Connection) -> None:
            assert await connection.read_exactly(5) == b"first"
            connection.write(b"ok")
            try:
                await connection.read_exactly(5)
            except ConnectionLost as loss:
                told.set_result(loss)
                raise

        tamper = False

        def change(data: bytes) -> bytes:
            return data[:-1] + bytes([data[-1] ^ 1]) if tamper else data

        network = StreamNetwork(credentials)
        async with listening(network, receive) as address, relayed(address, change) as between:
            connection = await network.connect(between, timeout_s=5)
            connection.write(b"first")
            assert await connection.read_exactly(2) == b"ok"
            tamper = True
            connection.write(b"other")
            assert "bad record mac" in str(await told)
            with pytest.raises(ConnectionLost):
                await connection.read(1)
            await connection.close()

    play(scenario)


def test_an_end_without_goodbye_is_a_loss_and_not_the_end_of_the_stream(
    play, credentials: Credentials
) -> None:
    async def scenario() -> None:
        told: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()

        async def receive(connection: Connection) -> None:
            assert await connection.read_exactly(5) == b"whole"
            connection.write(b"ok")
            try:
                await connection.read(1)
            except ConnectionLost as loss:
                told.set_result(loss)
                raise

        cut = False

        def change(data: bytes) -> bytes | None:
            return None if cut else data

        network = StreamNetwork(credentials)
        async with listening(network, receive) as address, relayed(address, change) as between:
            connection = await network.connect(between, timeout_s=5)
            connection.write(b"whole")
            assert await connection.read_exactly(2) == b"ok"
            cut = True
            connection.write(b"what is cut off")
            assert "broke off without TLS's goodbye" in str(await told)
            connection.abort()

    play(scenario)


def test_nothing_stays_open_of_what_was_served_or_refused(
    play, credentials: Credentials, tmp_path: Path
) -> None:
    stranger = forged(credentials, tmp_path, shown_by_another_cluster)

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        network, strange = StreamNetwork(credentials), StreamNetwork(stranger)

        async def visit() -> None:
            async with listening(network, Echo()) as address:
                await echoed(network, address)
                (await network.connect(address, timeout_s=5)).abort()
                refused = await strange.connect(address, timeout_s=5)
                with pytest.raises(ConnectionLost):
                    await refused.read(1)
                with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))):
                    await asyncio.sleep(0)
            async with listening(strange, Echo()) as address:
                with pytest.raises(ConnectFailed):
                    await network.connect(address, timeout_s=5)

        await visit()
        before = open_files()
        for _ in range(5):
            await visit()
        deadline = time.monotonic() + 5
        while open_files() > before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert open_files() <= before

    play(scenario)
