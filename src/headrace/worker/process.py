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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from headrace.worker.life import CannotStartError
from headrace.worker.options import WorkerOptions
from headrace.worker.session import RejectedError
from headrace.worker.supervisor import EngineLostError, Supervisor
from headrace.world import World, real_world
from headrace.world.launcher import LocalLauncher, die_with_parent
from headrace.world.private_directory import PrivateDirectory
from headrace.world.signals import Signals

ENGINE_COMMAND = (sys.executable, "-m", "headrace.worker.main")


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the process reads from its standard input."""

    worker: WorkerOptions
    engine: msgspec.Raw
    """Options of the engine, passed on as they are."""
    engine_command: tuple[str, ...] = ENGINE_COMMAND


async def run_worker(
    world: World, options: ProcessOptions, say: Callable[[str], None], engine_address: str | None = None
) -> None:
    """Run a worker until it was drained or a signal stops it; raises as `Supervisor.run`.

    The engine dials in at `engine_address`, or in a directory that is made for it.
    """
    seen: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        seen.append(number)
        if number == signal.SIGTERM and len(seen) == 1 and supervisor.serves:
            supervisor.drain()
        else:
            running.cancel()

    with Signals(on_signal), _where(engine_address) as address:
        launcher = LocalLauncher(options.engine_command, bytes(options.engine), say)
        supervisor = Supervisor(world, options.worker, launcher, address, report=say)
        running = asyncio.create_task(supervisor.run(), name="worker")
        try:
            await running
        except asyncio.CancelledError:
            if not running.cancelled():
                raise


@contextmanager
def _where(engine_address: str | None) -> Iterator[str]:
    """The address, or one in a directory that goes with the worker."""
    if engine_address is not None:
        yield engine_address
        return
    directory = PrivateDirectory("headrace-worker-")
    try:
        yield f"unix:{directory.path}/engine.sock"
    finally:
        directory.remove()


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
        asyncio.run(run_worker(real_world(), options, _say, engine_address))
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
    except OSError:  # a full disk takes none of our words now, and perhaps later
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
