"""The engine process: options in on standard input, a built engine, and the worker's loop until the end.

    python -m headrace.worker.main ADDRESS PARENT_PID < options.json

The one place where the worker's room meets the executor's. Exit code 0: drained, or the gateway is gone; 1:
the engine cannot be built as asked (the gateway was told why) or has failed (with a traceback).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from headrace.config import EngineOptions
from headrace.protocol.engine_messages import PoolInfo
from headrace.store import open_model
from headrace.worker.loop import report_start_failure, serve
from headrace.worker.memory import check_memory
from headrace.world import real_world
from headrace.world.launcher import die_with_parent

if TYPE_CHECKING:
    from headrace.execution.build import BuiltEngine


def main(arguments: list[str]) -> int:
    """Run one engine; `arguments` as in the module's docstring. Returns the exit code."""
    address, parent = arguments
    die_with_parent(int(parent))
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineOptions)
    try:
        check_memory((t.shape for t in open_model(Path(options.directory)).tensors.values()), options)
        built = _build(options)
    except (ValueError, OSError, MemoryError) as error:  # told to the supervisor, which tells the gateways
        message = f"out of memory: {error}" if isinstance(error, MemoryError) else str(error)
        asyncio.run(report_start_failure(real_world(), address, message))
        return 1
    try:
        # Not uvloop: its clock counts milliseconds, and steps are measured with the loop's clock.
        asyncio.run(serve(real_world(), address, built.engine, built.info, _pool(built)))
    finally:
        built.engine.executor.close()
    return 0


def _build(options: EngineOptions) -> BuiltEngine:
    # Imported here, so that a wrong name or too little memory is told before torch is loaded.
    from headrace.execution.build import build_engine

    return build_engine(options)


def _pool(built: BuiltEngine) -> PoolInfo | None:
    """Where the supervisor finds the KV blocks, if they are to travel."""
    info, memory = built.info, built.shared_kv
    if memory is None:
        return None
    return PoolInfo(memory.path, memory.nbytes, info.block_bytes, info.block_size)


def _run(arguments: list[str]) -> NoReturn:
    """`main`, and the end of the process without the interpreter's finalisation.

    With torch loaded that takes seconds of a core, in which whoever drained this worker waits for it; and
    there is nothing left that it would save.
    """
    try:
        code = main(arguments)
    except BaseException:  # whatever it is, it is printed and ends the process with 1
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _run(sys.argv[1:])
