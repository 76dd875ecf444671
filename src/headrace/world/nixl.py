"""A NIXL agent as the rest of Headrace sees it: started in a process of its own, and again when it is lost.

In: shared memory, and the address whose interface it may use. Out: a `MemoryAgent`. It must not know NIXL
itself, which only `nixl_process.py` imports, nor blocks.

    start ─▶ Ready ─▶ orders ─▶ a read fails, or is not over `QUIET_S` after it was given up ─▶ killed
      ▲                  └▶ the process ends ───────────────────────────────────────────────────┤
      └───────────────────────────────── pause ◀── everybody who waits is told, once it is gone ┘

A read that did not end well may still be writing as far as anybody can tell, so the process is killed, and
`read` ends when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from headrace.world.agent import AgentUnavailable, MemoryAgent, ReadFailed
from headrace.world.interfaces import interface_of, rdma_ports
from headrace.world.launcher import to_the_end
from headrace.world.network import split_host_port
from headrace.world.nixl_messages import (
    PACKAGES,
    PREFIX_BYTES,
    Done,
    FromAgent,
    Read,
    Ready,
    Serve,
    Stop,
    Sum,
    ToAgent,
    frame,
)

LOOPBACK = "lo"

START_TIMEOUT_S = 20.0
"""How long an agent may take to stand: it imports NIXL, and registers memory with network cards."""

QUIET_S = 1.0
"""How long a read that nobody wants any more may take to be over before its agent is killed."""

LAST_WORDS_S = 1.0
"""How long a process that has left its socket may take to say why and end."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
"""Pauses before a lost agent is started again, doubled until one has read or served something."""


class _NotQuiet(ReadFailed):
    """A read failed, and nobody knows whether all of it is over."""


async def open_nixl(
    path: str,
    size: int,
    address: str,
    report: Callable[[str], None] = lambda line: None,
    *,
    open_to_network: bool = False,
) -> MemoryAgent:
    """An agent over the shared memory at `path`, that uses the interface of `address`, HOST:PORT.

    UCX lets in whoever dials, so without `open_to_network` there is none but on loopback. `report` gets lines
    for people. Raises AgentUnavailable.
    """
    if not any(importlib.util.find_spec(name) for name in PACKAGES):
        raise AgentUnavailable("NIXL is not installed; pip install 'headrace[nixl]'")
    if sys.platform != "linux":
        raise AgentUnavailable(f"NIXL runs on Linux, and this is {sys.platform}")
    try:
        interface = interface_of(split_host_port(address)[0])
        environment, error_handling = settings(address, interface)
    except (OSError, ValueError) as error:
        raise AgentUnavailable(f"NIXL cannot use the interface of {address}: {error}") from error
    if interface != LOOPBACK and not open_to_network:
        raise AgentUnavailable(
            f"NIXL lets in whoever reaches it at {interface}; "
            "--connector nixl allows that, on a network that is the cluster's own"
        )
    agent = NixlAgent((path, str(size), error_handling), environment, report)
    try:
        await agent.start()
    except BaseException:
        await agent.close()
        raise
    return agent


def settings(address: str, interface: str) -> tuple[dict[str, str], str]:
    """The environment and the error handling of UCX for an agent at `address`; what the user has set stays.

    Where all peers are on this machine nothing listens: bytes go from process to process, which the kernel
    allows processes of one user only. Else UCX listens at the interface, and has to notice that peers die.
    """
    host, _ = split_host_port(address)
    here = interface == LOOPBACK
    ours = {
        "UCX_NET_DEVICES": ",".join([interface] if here else [interface, *rdma_ports()]),
        "UCX_TCP_AF_PRIO": "inet6,inet" if ":" in host else "inet,inet6",
        "UCX_TLS": "posix,cma" if here else "^posix,sysv",
        "UCX_HANDLE_ERRORS": "none",
        "UCX_LOG_LEVEL": "error",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "NIXL_LOG_LEVEL": "ERROR",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which NIXL imports and nobody uses here
    }
    return ours | os.environ, "none" if here and "UCX_TLS" not in os.environ else "peer"


class NixlAgent(MemoryAgent):
    """From `start` to `close`."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], report: Callable[[str], None]
    ) -> None:
        self.address = b""
        self._arguments = arguments
        self._environment = environment
        self._report = report
        self._decoder: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}
        self._servings = 0
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last_line = ""
        self._was_useful = False
        self._keeping: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until the agent stands. Raises AgentUnavailable."""
        self._started = asyncio.get_running_loop().create_future()
        self._keeping = asyncio.create_task(self._keep(), name="nixl agent")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(self._started)
        except TimeoutError:
            raise AgentUnavailable(f"NIXL's agent did not stand after {START_TIMEOUT_S:g} s") from None

    async def read(self, peer: bytes, ours: Sequence[int], theirs: Sequence[int], size: int) -> None:
        number = next(self._numbers)
        done = self._order(number, Read(number, peer, list(ours), list(theirs), size))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self._tell(Stop(number))
            await to_the_end(self._quiet(done))
            raise
        except _NotQuiet:
            await to_the_end(self._gone())
            raise

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        self._servings += 1
        if self._servings == 1:
            self._tell(Serve(True))
        try:
            yield
        finally:
            self._servings -= 1
            if self._servings == 0:
                self._tell(Serve(False))

    async def checksums(self, offsets: Sequence[int], size: int) -> list[int]:
        number = next(self._numbers)
        return await self._order(number, Sum(number, list(offsets), size))

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await to_the_end(self._gone())

    # ---- orders --------------------------------------------------------------------------------------

    def _order(self, number: int, order: ToAgent) -> asyncio.Future[list[int]]:
        """What becomes of an order. Raises ReadFailed where nobody takes it."""
        if self._writer is None:
            raise ReadFailed("the NIXL agent was lost and starts again")
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        done.add_done_callback(_look)
        self._writer.write(frame(order))
        return done

    def _tell(self, order: ToAgent) -> None:
        if self._writer is not None:
            self._writer.write(frame(order))

    async def _quiet(self, done: asyncio.Future[list[int]]) -> None:
        """Wait until a read that is not wanted is over."""
        await asyncio.wait({done}, timeout=QUIET_S)
        if not done.done() or isinstance(done.exception(), _NotQuiet):
            await self._gone()

    async def _gone(self) -> None:
        """Kill the process, and wait until it is gone."""
        process = self._process
        if process is not None:
            self.address = b""
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # ---- the process ---------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep an agent running until cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            self._was_useful = False
            how = await self._live()
            if self._started is not None and not self._started.done():
                self._started.set_exception(AgentUnavailable(f"NIXL's agent does not start: {how}"))
                return
            pause_s = FIRST_PAUSE_S if self._was_useful else min(2 * pause_s, LONGEST_PAUSE_S)
            self._report(f"the NIXL agent was lost with {how}; KV blocks move over TCP until it stands again")
            await asyncio.sleep(pause_s)

    async def _live(self) -> str:
        """One process from its start to its end; returns how it ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "headrace.world.nixl_process"),
                    *(str(theirs.fileno()), str(os.getpid()), *self._arguments),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env=dict(self._environment),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            return str(error)
        self._last_line = ""
        listening = asyncio.create_task(self._keep_words(process))
        try:
            await self._hear(ours)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await listening  # ends with the process
        finally:
            self.address, self._writer = b"", None
            await to_the_end(self._gone())  # before anybody hears that it is quiet
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            lost, self._waiting = self._waiting, {}
            for done in lost.values():
                if not done.done():
                    done.set_exception(ReadFailed(f"the NIXL agent was lost ({self._how(process)})"))
            self._process = None
        return self._how(process)

    def _how(self, process: asyncio.subprocess.Process) -> str:
        code = process.returncode
        return f"{self._last_line} (exit status {code})" if self._last_line else f"exit status {code}"

    async def _hear(self, sock: socket.socket) -> None:
        """Read what the agent says, until it says nothing any more."""
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(PREFIX_BYTES), "big")
                message = self._decoder.decode(await reader.readexactly(size))
                if isinstance(message, Ready):
                    self._stand(message, writer)
                else:
                    self._settle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # its process has ended, or is about to
        finally:
            writer.close()

    def _stand(self, ready: Ready, writer: asyncio.StreamWriter) -> None:
        self._writer, self.address = writer, ready.address
        if self._servings:
            self._tell(Serve(True))
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _settle(self, message: Done) -> None:
        done = self._waiting.pop(message.number, None)
        if done is None or done.done():
            return
        if message.error:
            done.set_exception((ReadFailed if message.quiet else _NotQuiet)(message.error))
        else:
            self._was_useful = True
            done.set_result(message.checksums)

    async def _keep_words(self, process: asyncio.subprocess.Process) -> None:
        """Remember the last line that it printed: libraries print there why they end."""
        while process.stdout is not None and (chunk := await process.stdout.read(1 << 16)):
            lines = chunk.decode(errors="replace").strip().splitlines()
            self._last_line = lines[-1][:300] if lines else self._last_line


def _look(done: asyncio.Future[list[int]]) -> None:
    """Nobody has to be there any more to see an order fail."""
    if not done.cancelled():
        done.exception()
