"""Work shared out to processes of this machine: results in order, as if each piece had been done here.

In: pieces of work and a function. Out: an iterator over results. The processes end with whoever reads them,
however that ends, and leave the terminal's Ctrl-C to it. It must not know what the work is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from headrace.world.launcher import die_with_parent

Work = TypeVar("Work")
Result = TypeVar("Result")


def in_processes(do: Callable[[Work], Result], work: Sequence[Work], count: int) -> Iterator[Result]:
    """`do` of each piece, in order, `count` of them at a time. `do`, pieces and results can be pickled.

    Raises ChildProcessError when a process ends before its work.
    """
    context = multiprocessing.get_context("spawn")
    # Pipes and nothing else: a pool's semaphores outlive its process when that is killed.
    workers: dict[Connection, SpawnProcess] = {}
    try:
        with _interrupts_held():
            for _ in range(min(count, len(work))):
                ours, theirs = context.Pipe()
                workers[ours] = context.Process(target=_serve, args=(theirs, do, os.getpid()), daemon=True)
                workers[ours].start()
                theirs.close()
        given = iter(range(len(work)))
        at: dict[Connection, int] = {}
        done: dict[int, Result] = {}
        idle, told = list(workers), 0
        while told < len(work):
            for worker, number in zip(idle, given, strict=False):
                at[worker] = number
                worker.send(work[number])
            idle = [worker for worker in wait([*at]) if isinstance(worker, Connection)]
            for worker in idle:
                done[at.pop(worker)] = _received(worker, workers[worker])
            while told in done:
                yield done.pop(told)
                told += 1
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def _received(worker: Connection, process: SpawnProcess) -> Any:
    try:
        return worker.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"a process that was to work ended with {process.exitcode}") from None


def _serve(pipe: Connection, do: Callable[[Any], Any], parent_pid: int) -> None:
    die_with_parent(parent_pid)
    while True:
        try:
            pipe.send(do(pipe.recv()))
        except (EOFError, BrokenPipeError):  # nobody wants it any more
            return


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that start here never get SIGINT: it waits for them, and they are ended instead."""
    resource_tracker.ensure_running()  # else the first process starts it, and it lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
