"""A run: sends the requests of a workload when they are due, and keeps a record of each.

In: a target, a workload, a load. Out: records. Open loop: the schedule goes on however slow the answers
are. Closed loop: the next session begins when one of a fixed number ends. A limit on concurrency holds
sessions back in either, and a session in its think time counts as under way, as a user would.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headrace.bench.errors import BenchError, Failure, FailureKind, RequestFailed
from headrace.bench.http import Clock
from headrace.bench.record import Record
from headrace.bench.target import Answer, Target, Turn
from headrace.bench.workload import Session, Workload


@dataclass(frozen=True)
class Load:
    """How much is sent, and when. Times in seconds."""

    due: Callable[[], Iterator[float]] | None = None
    """When each session is due, from the start; None begins one whenever another has ended."""
    concurrency: int | None = None
    """Sessions under way at once."""
    requests: int | None = None
    duration_s: float | None = None
    """No request begins later; those under way end in their own time."""
    timeout_s: float = 600.0
    """A request's limit."""

    def __post_init__(self) -> None:
        if self.due is None and self.concurrency is None:
            raise BenchError("without a rate there must be a concurrency")
        for name, value in (("the concurrency", self.concurrency), ("the number of requests", self.requests)):
            if value is not None and value < 1:
                raise BenchError(f"{name} must be at least 1, got {value}")
        if self.requests is None and self.duration_s is None:
            raise BenchError("a run needs a number of requests or a duration, or it would never end")
        for name, seconds in (("duration", self.duration_s), ("timeout", self.timeout_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise BenchError(f"the {name} must be above 0 s, got {seconds:g}")


class _Slots:
    """A limit on what is under way, that knows since when a slot has been free."""

    def __init__(self, size: int | None, now: Clock) -> None:
        self._free: deque[float] | None = None if size is None else deque([-math.inf] * size)
        self._waiter: asyncio.Future[None] | None = None  # only the schedule waits
        self._now = now

    async def take(self) -> float:
        """Wait for a slot; returns since when it has been free."""
        if self._free is None:
            return -math.inf
        while not self._free:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._free.popleft()

    def give_back(self) -> None:
        if self._free is None:
            return
        self._free.append(self._now())
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Run:
    """One run. What it has measured so far can be read at any time."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        load: Load,
        *,
        now: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        """`now` must be the clock that the target takes its times from."""
        self._target = target
        self._workload = workload
        self._load = load
        self._now = now
        self._cpu_clock = cpu_clock
        self._slots = _Slots(load.concurrency, now)
        self._runner: asyncio.Task[None] | None = None
        self.records: list[Record] = []
        self.began_s = 0.0
        self.ended_s: float | None = None
        self.cpu_s = 0.0
        """Processor time of the generator, in the run that has ended."""
        self.interrupted = False
        self.under_way: dict[int, Record] = {}
        """Requests that have been sent and not ended, by number."""
        self.most_running = 0
        self._ended_chunks = 0
        self.ended = 0
        self.failed = 0
        self.unsent = 0
        """Turns that were not sent because an earlier turn of their session failed, or the duration was
        over.
        """

    async def run(self) -> None:
        """Send everything and wait for all answers. After `stop` it returns as well, with `interrupted`
        set.
        """
        self._runner = asyncio.current_task()
        gc.collect()
        gc.freeze()  # what is loaded by now is not looked through again while times are taken
        cpu_s = self._cpu_clock() - self._target.served_cpu_s
        self.began_s = self._now()
        try:
            async with asyncio.TaskGroup() as sessions:
                await self._start_sessions(sessions)
        except asyncio.CancelledError:
            if not self.interrupted or self._runner is None:
                raise
            self._runner.uncancel()
        finally:
            self.ended_s = self._now()
            self.cpu_s = self._cpu_clock() - self._target.served_cpu_s - cpu_s
            gc.unfreeze()

    def stop(self) -> None:
        """End the run now: requests under way are cancelled, and count as such."""
        if self._runner is not None and self.ended_s is None and not self.interrupted:
            self.interrupted = True
            self._runner.cancel()

    @property
    def elapsed_s(self) -> float:
        return (self.ended_s if self.ended_s is not None else self._now()) - self.began_s

    @property
    def chunks(self) -> int:
        """Chunks that have arrived so far."""
        return self._ended_chunks + sum(len(record.times) for record in self.under_way.values())

    @property
    def over(self) -> bool:
        """Whether the duration is over."""
        return self._load.duration_s is not None and self._now() - self.began_s >= self._load.duration_s

    async def _start_sessions(self, tasks: asyncio.TaskGroup) -> None:
        due = self._load.due() if self._load.due is not None else itertools.repeat(0.0)
        sessions = self._workload.sessions(self._load.requests)
        for number, (offset, session) in enumerate(zip(due, sessions, strict=False)):
            if self._load.duration_s is not None and offset >= self._load.duration_s:
                return
            first = session.next(None)  # made ahead of time, so that making it delays nothing
            if first is None:
                continue
            due_s = self.began_s + offset
            if (wait_s := due_s - self._now()) > 0:
                await asyncio.sleep(wait_s)
            free_s = await self._slots.take()
            if self.over:
                return
            if self._load.due is None:
                due_s = max(due_s, free_s)
            record = self._new_record(number, 0, due_s, max(due_s, free_s), first.max_tokens)
            tasks.create_task(self._session(session, first, record))

    def _new_record(self, session: int, turn: int, due_s: float, ready_s: float, asked: int | None) -> Record:
        record = Record(len(self.records), session, turn, due_s, ready_s, asked)
        self.records.append(record)
        return record

    async def _session(self, session: Session, turn: Turn, record: Record) -> None:
        try:
            while True:
                answer = await self._request(turn, record)
                if answer is None or self.over:
                    self.unsent += session.left
                    return
                following = session.next(answer)
                if following is None:
                    return
                due_s = self._now() + following.think_s
                if following.think_s > 0:
                    await asyncio.sleep(following.think_s)
                turn = following
                record = self._new_record(record.session, record.turn + 1, due_s, due_s, turn.max_tokens)
        finally:
            self._slots.give_back()

    async def _request(self, turn: Turn, record: Record) -> Answer | None:
        """Send a turn; None if it failed."""
        self.under_way[record.number] = record
        self.most_running = max(self.most_running, len(self.under_way))
        try:
            async with asyncio.timeout(self._load.timeout_s):
                return await self._target.send(turn, record)
        except TimeoutError:
            limit = f"not ended within {self._load.timeout_s:g} s"
            record.failure = Failure(FailureKind.TIMEOUT, limit)
        except RequestFailed as error:
            record.failure = error.failure
        except asyncio.CancelledError:
            record.failure = Failure(FailureKind.CANCELLED, "the run was stopped")
            raise
        finally:
            record.ended_s = self._now()
            del self.under_way[record.number]
            self._ended_chunks += len(record.times)
            self.ended += 1
            self.failed += record.failure is not None
        return None
