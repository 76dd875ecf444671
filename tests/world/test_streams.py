"""What only real sockets have: files, modes, kernels' limits, and the real world itself."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from headrace.world import ConnectFailed, Connection, ConnectionLost, RandomStreams, World, real_world

pytestmark = pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])


def play(
    new_loop: Callable[[], asyncio.AbstractEventLoop], scenario: Callable[[World], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await scenario(real_world())

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def greet(connection: Connection) -> None:
    connection.write(b"hello")


async def greeting(world: World, address: str) -> bytes:
    connection = await world.network.connect(address, timeout_s=5)
    data = await connection.read_exactly(5)
    await connection.close()
    return data


def test_a_unix_socket_is_its_owners_and_goes_with_its_listener(new_loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def scenario(world: World) -> None:
        listener = await world.network.listen(f"unix:{path}", greet)
        assert listener.address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await greeting(world, listener.address) == b"hello"
        await listener.close()
        assert not path.exists()
        await listener.close()

    play(new_loop, scenario)


def test_a_listener_does_not_remove_its_successors_socket(new_loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def scenario(world: World) -> None:
        first = await world.network.listen(f"unix:{path}", greet)
        path.rename(tmp_path / "elsewhere")  # keeps its inode from being used again
        second = await world.network.listen(f"unix:{path}", greet)
        await first.close()
        assert await greeting(world, second.address) == b"hello"
        await second.close()
        path.touch()
        third = await world.network.listen(f"unix:{tmp_path}/third", greet)
        (tmp_path / "third").unlink()
        await third.close()

    play(new_loop, scenario)


def test_a_dead_processs_socket_is_replaced_and_nothing_else_is(new_loop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # a process that was killed leaves the file behind

    async def scenario(world: World) -> None:
        listener = await world.network.listen(f"unix:{path}", greet)
        assert await greeting(world, listener.address) == b"hello"
        with pytest.raises(OSError, match="in use"):
            await world.network.listen(f"unix:{path}", greet)
        assert await greeting(world, listener.address) == b"hello"
        await listener.close()
        path.write_text("a file")
        with pytest.raises(OSError, match="cannot listen at unix:"):
            await world.network.listen(f"unix:{path}", greet)
        assert path.read_text() == "a file"
        with pytest.raises(ConnectFailed, match="nothing listens there"):
            await world.network.connect(f"unix:{path}", timeout_s=1)

    play(new_loop, scenario)


def test_a_unix_path_has_the_kernels_limit(new_loop, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for call in (
            world.network.listen("unix:/" + "x" * 107, greet),
            world.network.connect("unix:/" + "é" * 54, timeout_s=1),
        ):
            with pytest.raises(ValueError, match="1 to 107 bytes"):
                await call
        with pytest.raises(OSError, match="no such file or directory"):
            await world.network.listen(f"unix:{tmp_path}/none/socket", greet)

    play(new_loop, scenario)


def test_a_full_backlog_is_waited_for(new_loop, tmp_path: Path) -> None:
    """Unix sockets refuse at once where TCP would wait; both shall look alike."""
    path = f"{tmp_path}/socket"

    async def scenario(world: World) -> None:
        with socket.socket(socket.AF_UNIX) as slow, socket.socket(socket.AF_UNIX) as first:
            slow.bind(path)
            slow.listen(0)
            first.connect(path)
            attempt = asyncio.create_task(world.network.connect(f"unix:{path}", timeout_s=10))
            await asyncio.sleep(0.1)
            assert not attempt.done()
            slow.accept()[0].close()
            connection = await attempt
            accepted = slow.accept()[0]
            connection.write(b"late")
            await connection.drain()
            assert accepted.recv(10) == b"late"
            accepted.close()
            await connection.close()

    play(new_loop, scenario)


def test_addresses_of_both_families_and_names(new_loop) -> None:
    async def scenario(world: World) -> None:
        hosts = ["127.0.0.1", "localhost", *(["::1"] if has_ipv6() else [])]
        for host in hosts:
            listener = await world.network.listen(f"[{host}]:0" if ":" in host else f"{host}:0", greet)
            assert not listener.address.endswith(":0")
            assert listener.address.startswith("[::1]:") if host == "::1" else True
            assert await greeting(world, listener.address) == b"hello"
            await listener.close()
        for call in (
            world.network.connect("no-such-host.invalid:1", timeout_s=10),
            world.network.listen("no-such-host.invalid:1", greet),
        ):
            with pytest.raises(OSError, match=r"no-such-host\.invalid:1: the name cannot be resolved"):
                await call
        with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1:0: cannot assign"):
            await world.network.listen("192.0.2.1:0", greet)

    play(new_loop, scenario)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_port_is_free_again_after_its_listener(new_loop) -> None:
    async def scenario(world: World) -> None:
        address = "127.0.0.1:0"
        for _ in range(5):
            listener = await world.network.listen(address, greet)
            address = listener.address
            assert await greeting(world, address) == b"hello"
            await listener.close()

    play(new_loop, scenario)


def test_nothing_stays_open(new_loop, tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def wait_for_end(connection: Connection) -> None:
        await connection.read(1)

    async def scenario(world: World) -> None:
        async def visit(address: str) -> None:
            listener = await world.network.listen(address, wait_for_end)
            for leave in ("close", "abort"):
                connection = await world.network.connect(listener.address, timeout_s=5)
                if leave == "close":
                    await connection.close()
                else:
                    connection.abort()
                    await connection.close()
            await listener.close()
            with pytest.raises(ConnectFailed):
                await world.network.connect(listener.address, timeout_s=5)
            with pytest.raises((OSError, ValueError)):
                await world.network.listen("unix:/proc/nowhere/socket", greet)

        addresses = ("127.0.0.1:0", f"unix:{tmp_path}/socket")
        for address in addresses:
            await visit(address)
        before = open_files()
        for _ in range(5):
            for address in addresses:
                await visit(address)
        deadline = time.monotonic() + 5
        while open_files() > before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert open_files() <= before

    play(new_loop, scenario)


def test_a_loss_has_a_peer_and_a_reason(new_loop) -> None:
    async def scenario(world: World) -> None:
        peers: asyncio.Queue[Connection] = asyncio.Queue()

        async def handler(connection: Connection) -> None:
            peers.put_nowait(connection)
            await connection.read(1)

        listener = await world.network.listen("127.0.0.1:0", handler)
        client = await world.network.connect(listener.address, timeout_s=5)
        server = await peers.get()
        assert client.peer == listener.address
        assert server.peer.startswith("127.0.0.1:")
        assert server.peer != client.peer
        server.abort()
        with pytest.raises(ConnectionLost, match=rf"connection with {client.peer} lost: .*reset") as raised:
            await client.read(1)
        assert raised.value.peer == client.peer
        await listener.close()

    play(new_loop, scenario)


def test_the_real_world(new_loop) -> None:
    async def scenario(world: World) -> None:
        earlier = world.now()
        await asyncio.sleep(0.01)
        assert 0.005 < world.now() - earlier < 5
        assert world.trace("nothing happens", 1) is None
        draws = {real_world().random.stream("router").random() for _ in range(3)}
        assert len(draws) == 3
        assert isinstance(world.random, RandomStreams)

    play(new_loop, scenario)
