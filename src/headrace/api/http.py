"""The HTTP server that carries the application: uvicorn, started and stopped by whoever runs the process.

In: an application and a bound socket. Out: nothing but answers. Signals are not its business.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

ACCEPT_BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays open; above the 60 s after which most proxies give one up themselves."""

CLOSE_TIMEOUT_S = 5
"""How long answers that are complete may take to reach slow clients when the server stops."""

_TICK_S = 1.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: any free one). Raises OSError that says what to do."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(error.errno, f"the host {host!r} cannot be resolved: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        # Listening here, not later, is what makes a second server on this port fail before it loads a model.
        bound.listen(ACCEPT_BACKLOG)
    except OSError as error:
        bound.close()
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        what = "--host, an address of this machine" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise OSError(error.errno, f"cannot listen at {host}:{port}: {why}; choose another {what}") from error
    return bound


class HttpServer:
    """Answers on one socket from `start` to `stop`."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            backlog=ACCEPT_BACKLOG,
        )
        self._socket = bound
        self._uvicorn = _Uvicorn(config)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when connections are answered."""
        self._running = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]), name="http")
        started = asyncio.create_task(self._uvicorn.accepting.wait())
        await asyncio.wait({self._running, started}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            await self._running

    async def stop(self) -> None:
        """Stop accepting, let running answers end, and return. What drags on is cut off."""
        if self._running is None:
            self._socket.close()
        else:
            self._uvicorn.leave()
            await self._running


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own, and idle between ticks of a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leaving.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # also writes the Date header, whose unit is the second
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._leaving.wait()
