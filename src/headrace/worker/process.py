"""A worker's supervisor as a process of its own: options in on standard input, and a worker until the end.

    python -m headrace.worker.process ADDRESS PARENT_PID < options.json

ADDRESS is the gateway's unix socket; in its directory the engine dials in. SIGTERM drains, SIGINT and a
second signal stop at once. Exit code 0: drained or stopped; 1: the worker cannot go on, which was printed and
told to the gateways.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

import msgspec

from headrace.worker.life import CannotStartError
from headrace.worker.options import WorkerOptions
from headrace.worker.session import RejectedError
from headrace.worker.supervisor import EngineLostError, Supervisor
from headrace.world import World, real_world
from headrace.world.launcher import LocalLauncher, die_with_parent

ENGINE_COMMAND = (sys.executable, "-m", "headrace.worker.main")


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the process reads from its standard input."""

    worker: WorkerOptions
    engine: msgspec.Raw
    """Options of the engine, passed on as they are."""
    engine_command: tuple[str, ...] = ENGINE_COMMAND


async def run_worker(
    world: World, options: ProcessOptions, engine_address: str, say: Callable[[str], None]
) -> None:
    """Run a worker until it was drained or a signal stops it; raises as `Supervisor.run`.

    The engine dials in at `engine_address`.
    """
    launcher = LocalLauncher(options.engine_command, bytes(options.engine), say)
    supervisor = Supervisor(world, options.worker, launcher, engine_address, report=say)
    running = asyncio.create_task(supervisor.run(), name="worker")
    with _Signals(supervisor, running):
        try:
            await running
        except asyncio.CancelledError:
            if not running.cancelled():
                raise


class _Signals:
    """While inside, signals drain and stop a worker."""

    def __init__(self, supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        self._supervisor = supervisor
        self._running = running
        self._seen = 0

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def __exit__(self, *exception: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # it is about to end, and ends well

    def _on_signal(self, number: int) -> None:
        self._seen += 1
        if number == signal.SIGTERM and self._seen == 1 and self._supervisor.serves:
            self._supervisor.drain()
        else:
            self._running.cancel()


def main(arguments: list[str]) -> int:
    """Run one worker; `arguments` as in the module's docstring. Returns the exit code."""
    address, parent = arguments
    die_with_parent(int(parent))
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=ProcessOptions)
    worker = msgspec.structs.replace(options.worker, join=(address,))
    options = msgspec.structs.replace(options, worker=worker)
    try:
        # Beside the gateway's socket, in the directory that goes with the gateway.
        engine_address = f"{address.rpartition('/')[0]}/{worker.worker_id}.sock"
        asyncio.run(run_worker(real_world(), options, engine_address, _say))
    except CannotStartError:  # the gateway was told why, and tells
        return 1
    except (EngineLostError, RejectedError) as error:
        _say(str(error))
        return 1
    return 0


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads; what is to be said is of no interest any more
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
