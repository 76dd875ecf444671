"""The places in which a network scenario runs: real sockets under two event loops, and the simulation."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from headrace.sim import Crash, LinkProfile, Simulation, run
from headrace.world import Network
from headrace.world.credentials import Credentials, make_credentials
from headrace.world.streams import StreamNetwork

SCENARIO_DEADLINE_S = 20

PEER_PROGRAM = """
import socket, ssl, sys, time
kind, where, unread, credentials = sys.argv[1:]
if kind == "unix":
    s = socket.socket(socket.AF_UNIX); s.connect(where)
else:
    s = socket.socket(); s.connect(("127.0.0.1", int(where)))
if kind == "tls":
    tls = ssl.create_default_context(cafile=credentials + "/ca.pem")
    tls.load_cert_chain(credentials + "/node.pem", credentials + "/node.key")
    s = tls.wrap_socket(s, server_hostname="headrace")
s.sendall(b"ready")
if unread == "read":
    while s.recv(65536): pass
time.sleep(60)
"""
"""A peer that says `ready` and then reads for ever, or never reads at all."""


class Stage(ABC):
    """What one run of a scenario gets."""

    server: Network
    client: Network
    address: str
    """Where the server may listen, on any free port."""
    nowhere: str
    """Where nobody listens."""
    resets: bool
    """Whether an abort reaches the peer as a loss even if it only reads."""
    one_way_s: float
    """About what a byte takes to the other side."""
    buffer_bound: int
    """More than this never leaves a writer whose reader has stopped."""
    reports: list[dict[str, Any]]
    """What came to the event loop's exception handler."""

    @abstractmethod
    async def start_peer(self, address: str, *, reads: bool) -> Callable[[], None]:
        """Start another process that connects, writes `ready` and then reads or not; the result kills it."""

    @abstractmethod
    def unanswered_address(self, cleanup: ExitStack) -> str | None:
        """An address where a connection attempt gets no answer; None if this place has none."""


class Place(ABC):
    @abstractmethod
    def play(self, scenario: Callable[[Stage], Awaitable[None]]) -> None:
        """Run the scenario to its end, and see that it leaves no task and no report behind."""


NewLoop = Callable[[], asyncio.AbstractEventLoop]


class RealStage(Stage):
    one_way_s = 0.0003
    buffer_bound = 24 * 1024 * 1024  # sockets' buffers grow on their own; the usual limits add up to 10 MiB

    def __init__(self, kind: str, directory: Path, credentials: Credentials) -> None:
        self._kind = kind
        self._credentials = credentials
        self.server = self.client = StreamNetwork(credentials if kind == "tls" else None)
        self.resets = kind != "unix"
        self.reports = []
        if kind == "unix":
            self.address = f"unix:{directory}/listener"
            self.nowhere = f"unix:{directory}/nobody"
        else:
            self.address = "127.0.0.1:0"
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.nowhere = f"127.0.0.1:{probe.getsockname()[1]}"

    async def start_peer(self, address: str, *, reads: bool) -> Callable[[], None]:
        where = address.removeprefix("unix:").rpartition(":")[2]
        arguments = [self._kind, where, "read" if reads else "unread", str(self._credentials.directory)]
        pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-E", "-c", PEER_PROGRAM, *arguments], {})

        def kill() -> None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

        return kill

    def unanswered_address(self, cleanup: ExitStack) -> str:
        # A listener that never accepts and whose backlog is full drops whoever comes next.
        unix = self.address.startswith("unix:")
        silent = cleanup.enter_context(socket.socket(socket.AF_UNIX if unix else socket.AF_INET))
        silent.bind(self.address.removeprefix("unix:") if unix else ("127.0.0.1", 0))
        silent.listen(0)
        cleanup.enter_context(socket.socket(silent.family)).connect(silent.getsockname())
        return self.address if unix else f"127.0.0.1:{silent.getsockname()[1]}"


class RealPlace(Place):
    def __init__(self, new_stage: Callable[[], RealStage], new_loop: NewLoop) -> None:
        self._new_stage = new_stage
        self._new_loop = new_loop

    def play(self, scenario: Callable[[Stage], Awaitable[None]]) -> None:
        stage = self._new_stage()

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: stage.reports.append(context))
            async with asyncio.timeout(SCENARIO_DEADLINE_S):
                await scenario(stage)
                while len(asyncio.all_tasks()) > 1:  # handlers that are just ending
                    await asyncio.sleep(0.001)

        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            runner.run(main())
        assert not stage.reports


class SimStage(Stage):
    address = "server:0"
    nowhere = "server:9"
    resets = True
    buffer_bound = 2 * 1024 * 1024

    def __init__(self, simulation: Simulation, crash: Crash, one_way_s: float) -> None:
        self._simulation = simulation
        self.one_way_s = one_way_s
        self._crash = crash
        self.server = simulation.world("server").network
        self.client = simulation.world("client").network
        self.reports = []

    async def start_peer(self, address: str, *, reads: bool) -> Callable[[], None]:
        async def peer() -> None:
            connection = await self._simulation.world("peer").network.connect(address, timeout_s=10)
            connection.write(b"ready")
            while not reads or await connection.read(65536):
                await asyncio.sleep(1)

        task = asyncio.create_task(peer())

        def kill() -> None:
            task.cancel()
            self._simulation.network.crash_host("peer", self._crash)

        return kill

    def unanswered_address(self, cleanup: ExitStack) -> str:
        self._simulation.network.partition("client", "server", one_way=True)
        return "server:1"


class SimPlace(Place):
    def __init__(self, seed: int, crash: Crash, link: LinkProfile) -> None:
        self._seed = seed
        self._crash = crash
        self._link = link

    def play(self, scenario: Callable[[Stage], Awaitable[None]]) -> None:
        async def main(simulation: Simulation) -> None:
            stage = SimStage(simulation, self._crash, self._link.latency_s)
            simulation.loop.set_exception_handler(lambda _, context: stage.reports.append(context))
            await scenario(stage)
            await asyncio.sleep(60)
            assert len(asyncio.all_tasks()) == 1, "the scenario left tasks behind"
            assert not stage.reports

        run(main, seed=self._seed, link=self._link, max_virtual_s=3600)


SLOW = LinkProfile(latency_s=0.04, jitter_s=0.02, bytes_per_s=20e6)
LOOPS: dict[str, NewLoop] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
PLACES = [f"{kind}-{loop}" for kind in ("tcp", "tls", "unix") for loop in LOOPS] + ["sim-near", "sim-far"]


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("cluster") / "credentials")


@pytest.fixture(params=PLACES)
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    credentials: Credentials,
) -> Iterator[Place]:
    monkeypatch.setattr("headrace.world.connection.LINGER_S", 0.2)
    kind, variant = request.param.split("-")
    if kind == "sim":
        near = variant == "near"
        yield SimPlace(1, Crash.RESET, LinkProfile()) if near else SimPlace(2, Crash.END, SLOW)
    else:
        yield RealPlace(lambda: RealStage(kind, tmp_path, credentials), LOOPS[variant])
