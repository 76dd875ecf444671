"""An asyncio event loop whose time is virtual and whose every run is the same.

In: callbacks and timers, as on any event loop. Out: the same order of execution on every run. When nothing is
ready, the clock jumps to the next timer; nothing waits for real. There are no sockets, threads, processes or
signals here: what would reach for them is refused by name. It must not know hosts, networks or worlds.

Order: ready callbacks run first in, first out, in batches as asyncio's own loop runs them; timers by time,
and at the same time in the order they were set. Tasks and futures hash by their number, so that
asyncio's own sets of them (`asyncio.wait`, `TaskGroup`, `all_tasks`) are walked in one order too. What hashes
by its address stays out of reach, such as bare coroutines in `asyncio.as_completed` (give it tasks).

`time`, `call_at` and `call_later` go by the clock that is read where they are called (`sim/clock.py`); `now`
and `call_true` by the run's own time, for what simulates the world between hosts.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import heapq
import itertools
import math
import struct
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVarTuple, Unpack

import msgspec

from headrace.sim.clock import CURRENT, HostClock
from headrace.world import TraceValue

_Ts = TypeVarTuple("_Ts")

PURGE_CANCELLED_ABOVE = 100
"""Cancelled timers that may wait in the heap before they are looked at; then at most half of it is dead."""

CALLBACKS_PER_COLLECTION = 50_000
"""How often garbage cycles are collected, counted in callbacks so that finalizers run at the same place."""


class SimulationError(RuntimeError):
    """The simulated program cannot go on; the text names the tasks that wait and where."""


class SimulationStalled(SimulationError):
    """Deadlock: the main coroutine is unfinished, nothing is ready, and no timer is set."""


class SimulationLimit(SimulationError):
    """The limit on virtual time or on callbacks was reached before the main coroutine finished."""


class _Task(asyncio.Task[Any]):
    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Timer(asyncio.TimerHandle):
    __slots__ = ("clock", "in_heap")
    in_heap: bool
    clock: HostClock | None
    """What it goes by; None: the true time."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of a simulation; see the module's docstring for what it promises."""

    # Of asyncio.BaseEventLoop, which appends to `_ready` and sets `_stopping`; `_scheduled` is our heap.
    _closed: bool
    _ready: deque[asyncio.Handle]
    _scheduled: list[tuple[float, int, _Timer]]
    _stopping: bool
    _thread_id: int | None

    def __init__(
        self, *, keep_trace: bool = False, callbacks_per_collection: int = CALLBACKS_PER_COLLECTION
    ) -> None:
        """`keep_trace` also keeps every traced event in `events`, to compare two runs line by line."""
        super().__init__()
        self._callbacks_per_collection = callbacks_per_collection
        self._now = 0.0
        self._serials = itertools.count(1)
        self._task_numbers = itertools.count(1)
        self._generators: weakref.WeakValueDictionary[int, AsyncGenerator[Any, Any]]
        self._generators = weakref.WeakValueDictionary()
        self._cancelled_timers = 0
        self._callbacks = 0
        self._between: list[tuple[int, int, asyncio.Handle]] = []
        self.limit()
        self._digest = hashlib.blake2b(digest_size=16)
        self._encode = msgspec.msgpack.Encoder().encode
        self.events: list[tuple[TraceValue, ...]] | None = [] if keep_trace else None

    def limit(self, *, max_virtual_s: float = math.inf, max_callbacks: int | None = None) -> None:
        """Raise SimulationLimit from the run when the clock would pass, or the callbacks reach, these."""
        self._max_virtual_s = max_virtual_s
        self._max_callbacks = max_callbacks

    # The clock and the order of things.

    @property
    def now(self) -> float:
        """True virtual seconds since the loop was made."""
        return self._now

    def time(self) -> float:
        """What the clock says that is read here: true time, if none is."""
        clock = CURRENT.get()
        return self._now if clock is None else clock.read(self._now)

    @property
    def callbacks(self) -> int:
        """How many callbacks have run."""
        return self._callbacks

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        # As BaseEventLoop has it, without what it does to debug: most of a run's time goes through here.
        if self._closed:
            raise RuntimeError("call_soon on a closed loop")
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        clock = CURRENT.get() if context is None else context.get(CURRENT)
        return self._set_timer(when, clock, callback, args, context)

    def call_true(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` at a true time, whatever the clock says that is read here or in `context`."""
        return self._set_timer(when, None, callback, args, context)

    def _set_timer(
        self,
        when: float,
        clock: HostClock | None,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> asyncio.TimerHandle:
        if self.is_closed():
            raise RuntimeError("call_at on a closed loop")
        if math.isnan(when):
            raise ValueError("call_at: the time is not a number")
        timer = _Timer(when, callback, args, self, context)
        timer.in_heap, timer.clock = True, clock
        due = when if clock is None else clock.due(when)
        heapq.heappush(self._scheduled, (due, next(self._serials), timer))
        return timer

    def set_clock(self, clock: HostClock, *, ahead_s: float = 0.0, rate: float = 1.0) -> None:
        """Put a clock wrong from now on; timers that go by it come when it says so.

        Raises ValueError as `HostClock.set` does.
        """
        clock.set(self._now, ahead_s=ahead_s, rate=rate)
        self._scheduled = [
            (clock.due(timer.when()) if timer.clock is clock else due, serial, timer)
            for due, serial, timer in self._scheduled
        ]
        heapq.heapify(self._scheduled)

    def call_after(self, callbacks: int, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> None:
        """Run `callback` when so many more callbacks have run: between any two at which something waits."""
        if callbacks < 1:
            raise ValueError(f"call_after {callbacks} callbacks: 1 is the next one")
        handle = asyncio.Handle(callback, args, self)
        heapq.heappush(self._between, (self._callbacks + callbacks, next(self._serials), handle))

    def _timer_handle_cancelled(self, handle: _Timer) -> None:
        if handle.in_heap:
            self._cancelled_timers += 1

    def _run_once(self) -> None:
        """One turn: move due timers to the ready queue, jump the clock if nothing is ready, run what is."""
        ready = self._ready
        if not ready and not self._stopping:
            self._jump()
        while self._scheduled and self._scheduled[0][0] <= self._now:
            timer = self._pop_timer()
            if not timer._cancelled:
                ready.append(timer)
        # Only what is ready now: what these callbacks add waits for the next turn, after timers due by then.
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            self._callbacks += 1
            if self._callbacks == self._max_callbacks:
                raise SimulationLimit(
                    f"{self._callbacks} callbacks ran, which is the limit; {self._waiting()}"
                )
            if self._callbacks % self._callbacks_per_collection == 0:
                gc.collect()
            handle._run()
            if self._between:
                self._run_between()

    def _run_between(self) -> None:
        while self._between and self._between[0][0] <= self._callbacks:
            heapq.heappop(self._between)[2]._run()

    def _jump(self) -> None:
        if self._cancelled_timers:
            self._drop_cancelled_timers()
        when = self._scheduled[0][0] if self._scheduled else math.inf
        if when == math.inf:
            raise SimulationStalled(
                f"nothing is ready and no timer is set at {self._now:g} s; {self._waiting()}"
            )
        if when > self._max_virtual_s:
            raise SimulationLimit(
                f"the limit of {self._max_virtual_s:g} virtual s is reached; {self._waiting()}"
            )
        if when > self._now:
            self._now = when
            self._digest.update(struct.pack(">d", when))

    def _pop_timer(self) -> _Timer:
        _, _, timer = heapq.heappop(self._scheduled)
        timer.in_heap = False
        if timer._cancelled:
            self._cancelled_timers -= 1
        return timer

    def _drop_cancelled_timers(self) -> None:
        cancelled = self._cancelled_timers
        if cancelled > PURGE_CANCELLED_ABOVE and cancelled * 2 > len(self._scheduled):
            self._scheduled = [entry for entry in self._scheduled if not entry[2].cancelled()]
            heapq.heapify(self._scheduled)
            self._cancelled_timers = 0
        while self._scheduled and self._scheduled[0][2].cancelled():
            self._pop_timer()

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        if self._thread_id not in (None, threading.get_ident()):
            raise _refusal("call_soon_threadsafe from another thread")
        return self.call_soon(callback, *args, context=context)

    # Tasks and futures that hash alike on every run.

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(next(self._serials), self)

    def create_task(  # type: ignore[override]  # the parameters differ between Python versions
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        number = next(self._task_numbers)
        return _Task(number, coro, loop=self, name=name or f"task-{number}", **options)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """The unfinished tasks, oldest first."""
        return sorted(asyncio.all_tasks(self), key=hash)

    def _asyncgen_firstiter_hook(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators[next(self._serials)] = generator

    async def shutdown_asyncgens(self) -> None:
        """Close the async generators that were begun and not finished, oldest first."""
        for _, generator in sorted(self._generators.items()):
            try:
                await generator.aclose()
            except Exception as error:  # reported; the others are still to be closed
                message = f"closing the async generator {generator!r} failed"
                self.call_exception_handler({"message": message, "exception": error, "asyncgen": generator})

    # The trace.

    def trace(self, *event: TraceValue) -> None:
        """Add an event, with the time, to the hash over this run."""
        self._digest.update(self._encode((self._now, event)))
        if self.events is not None:
            self.events.append((self._now, *event))

    def trace_hash(self) -> str:
        """The hash over every jump of the clock and every traced event so far, in hexadecimal."""
        return self._digest.hexdigest()

    # Seeing what waits.

    def _waiting(self) -> str:
        waiting = self.tasks()
        lines = [f"{len(waiting)} unfinished task(s):"]
        lines += [f"  {task.get_name()}: {describe_wait(task)}" for task in waiting]
        return "\n".join(lines)


def describe_wait(task: asyncio.Task[Any]) -> str:
    """Where a task stands: its chain of awaits from the outside in, as `function (file:line)`."""
    steps = [f"{code.co_qualname} ({code.co_filename}:{line})" for code, line in _awaits(task.get_coro())]
    waiter = getattr(task, "_fut_waiter", None)
    if isinstance(waiter, asyncio.Task):
        steps.append(f"task {waiter.get_name()}")
    elif waiter is not None:
        steps.append("a future")
    return " > ".join(steps)


def _awaits(awaitable: Any) -> Iterator[tuple[Any, int]]:
    while awaitable is not None:
        kind = next((k for k in ("cr", "gi", "ag") if hasattr(awaitable, f"{k}_frame")), None)
        if kind is None:
            return
        frame = getattr(awaitable, f"{kind}_frame")
        if frame is not None:
            yield frame.f_code, frame.f_lineno
        awaitable = getattr(awaitable, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


@contextmanager
def collected_by_count() -> Generator[None]:
    """Collect garbage cycles only where the loop says so and at the end, and only those made inside.

    Python's own trigger counts allocations, which differ between runs; a finalizer that runs elsewhere (the
    closing of an abandoned async generator) is another order of events. What exists before is frozen, so that
    a collection costs what the run has made, not what the process has loaded.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if enabled:
            gc.enable()


def _refusal(what: str) -> SimulationError:
    return SimulationError(
        f"{what} in a simulation: virtual time has no threads, sockets, processes or signals; "
        "reach the outside through the World"
    )


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(self: VirtualLoop, *args: object, **kwargs: object) -> NoReturn:
        raise _refusal(f"loop.{name}()")

    return refused


for _name in (
    *("run_in_executor", "set_default_executor", "getaddrinfo", "getnameinfo"),
    *("create_connection", "create_server", "create_unix_connection", "create_unix_server"),
    *("create_datagram_endpoint", "connect_accepted_socket", "start_tls", "sendfile"),
    *("add_reader", "remove_reader", "add_writer", "remove_writer"),
    *("sock_recv", "sock_recv_into", "sock_recvfrom", "sock_recvfrom_into", "sock_sendall", "sock_sendto"),
    *("sock_connect", "sock_accept", "sock_sendfile"),
    *("connect_read_pipe", "connect_write_pipe", "subprocess_shell", "subprocess_exec"),
    *("add_signal_handler", "remove_signal_handler"),
):
    setattr(VirtualLoop, _name, _refuse(_name))
