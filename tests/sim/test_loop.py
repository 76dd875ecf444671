"""The virtual loop: the same order as asyncio's own loop, in no time, and the same on every run."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sim import (
    SimulationError,
    SimulationLimit,
    SimulationStalled,
    UnhandledErrors,
    VirtualLoop,
    run,
)
from headrace.sim.loop import PURGE_CANCELLED_ABOVE, describe_wait

# One program, two loops.


class SteppedSelector(selectors.SelectSelector):
    """A selector that does not wait: it moves a clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "the program waits for ever"
            self.now += max(timeout, 0)
        return events


class NumberedTask(asyncio.Task[Any]):
    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self.number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class SteppedLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, all of it, with a clock that does not wait.

    Its tasks are numbered, since asyncio cancels the tasks of a group in the order of a set.
    """

    def __init__(self) -> None:
        self._clock = SteppedSelector()
        super().__init__(self._clock)
        numbers = itertools.count(1)
        self.set_task_factory(
            lambda loop, coro, **options: NumberedTask(next(numbers), coro, loop=loop, **options)
        )

    def time(self) -> float:
        return self._clock.now


Program = list[tuple[Any, ...]]


def programs(depth: int = 3) -> st.SearchStrategy[Program]:
    small = st.integers(0, 2)
    steps = [
        st.tuples(st.sampled_from(["sleep", "later"]), st.integers(0, 8)),
        st.tuples(st.sampled_from(["yield", "soon", "lock", "cancel"])),
        st.tuples(st.sampled_from(["put", "get", "set", "wait", "acquire", "release"]), small),
    ]
    if depth > 0:
        inner = programs(depth - 1)
        several = st.lists(inner, min_size=1, max_size=3)
        steps.append(st.tuples(st.sampled_from(["spawn", "shield"]), inner))
        steps.append(st.tuples(st.sampled_from(["gather", "group", "first"]), several))
        steps.append(st.tuples(st.just("timeout"), st.integers(0, 8), inner))
    return st.lists(st.one_of(steps), max_size=5)


class Interpreter:
    """Runs a program and writes down what happens when."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._durations = 0
        self._names = 0
        self._children: list[asyncio.Task[None]] = []

    async def main(self, program: Program) -> None:
        self._queues = [asyncio.Queue[str](1) for _ in range(3)]
        self._events = [asyncio.Event() for _ in range(3)]
        self._semaphores = [asyncio.Semaphore(count) for count in range(3)]
        self._lock = asyncio.Lock()
        try:
            async with asyncio.timeout(50):
                await self._run("main", program)
        except (TimeoutError, asyncio.CancelledError) as error:  # cancelled through a shielded child
            self._note("main", type(error).__name__)
        for child in self._children:
            child.cancel()
        for outcome in await asyncio.gather(*self._children, return_exceptions=True):
            self._note("main", "child", type(outcome).__name__)

    def _note(self, *event: Any) -> None:
        self.log.append((round(asyncio.get_running_loop().time(), 6), *event))

    def _duration(self, units: int) -> float:
        """Never the same twice, nor any sum of them: what is due at one time, asyncio runs in any order."""
        self._durations += 1
        return units * 0.5 + random.Random(self._durations).random() * 0.01

    def _child(self, program: Program) -> Coroutine[Any, Any, None]:
        self._names += 1
        return self._run(f"child {self._names}", program)

    async def _run(self, name: str, program: Program) -> None:
        try:
            for step in program:
                self._note(name, step[0])
                try:
                    await self._step(name, *step)
                except (TimeoutError, RuntimeError, BaseExceptionGroup) as error:
                    self._note(name, step[0], type(error).__name__)
                self._note(name, step[0], "done")
        except asyncio.CancelledError:
            self._note(name, "cancelled")
            raise

    async def _step(self, name: str, kind: str, *args: Any) -> None:
        loop = asyncio.get_running_loop()
        match kind:
            case "sleep":
                await asyncio.sleep(self._duration(args[0]))
            case "later":
                loop.call_later(self._duration(args[0]), self._note, name, "later ran")
            case "yield":
                await asyncio.sleep(0)
            case "soon":
                loop.call_soon(self._note, name, "soon ran")
            case "lock":
                async with self._lock:
                    await asyncio.sleep(self._duration(1))
            case "cancel":
                if self._children:
                    self._children[self._durations % len(self._children)].cancel()
            case "put":
                await self._queues[args[0]].put(name)
            case "get":
                self._note(name, "got", await self._queues[args[0]].get())
            case "set":
                self._events[args[0]].set()
            case "wait":
                await self._events[args[0]].wait()
            case "acquire":
                await self._semaphores[args[0]].acquire()
            case "release":
                self._semaphores[args[0]].release()
            case "spawn":
                self._children.append(asyncio.create_task(self._child(args[0])))
            case "shield":
                self._children.append(asyncio.create_task(self._child(args[0])))
                await asyncio.shield(self._children[-1])
            case "gather":
                await asyncio.gather(*(self._child(program) for program in args[0]))
            case "group":
                async with asyncio.TaskGroup() as group:
                    for program in args[0]:
                        group.create_task(self._child(program))
            case "first":
                tasks = [asyncio.create_task(self._child(program)) for program in args[0]]
                self._children += tasks
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._note(name, "first", [task in done for task in tasks])
            case "timeout":
                async with asyncio.timeout(self._duration(args[0])):
                    await self._run(f"{name} inner", args[1])


def trace_on(loop: asyncio.AbstractEventLoop, program: Program) -> list[tuple[Any, ...]]:
    interpreter = Interpreter()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(interpreter.main(program))
    return interpreter.log


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs())
def test_any_program_runs_as_on_asyncios_own_loop(program: Program) -> None:
    assert trace_on(VirtualLoop(), program) == trace_on(SteppedLoop(), program)


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_a_program_runs_as_on_a_real_clock(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> list[str]:
        log: list[str] = []
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        loop = asyncio.get_running_loop()

        async def producer() -> None:
            for number in range(3):
                await asyncio.sleep(0.06)
                await queue.put(number)
                log.append(f"put {number}")

        async def consumer() -> None:
            while True:
                log.append(f"got {await queue.get()}")

        async def sleeper() -> None:
            try:
                async with asyncio.timeout(0.09):
                    await asyncio.sleep(10)
            except TimeoutError:
                log.append("timed out")

        loop.call_later(0.03, log.append, "later")
        loop.call_soon(log.append, "soon")
        loop.call_later(1000, log.append, "never").cancel()
        consuming = asyncio.create_task(consumer())
        await asyncio.gather(producer(), sleeper())
        await asyncio.sleep(0.03)
        consuming.cancel()
        await asyncio.wait([consuming])
        log.append(str(consuming.cancelled()))
        return log

    with asyncio.Runner(loop_factory=new_loop) as real, asyncio.Runner(loop_factory=VirtualLoop) as virtual:
        assert real.run(main()) == virtual.run(main())


# Time and order.


def test_an_hour_of_heartbeats_takes_a_moment() -> None:
    async def main(simulation: Any) -> int:
        beats = 0

        async def beat(period_s: float) -> None:
            nonlocal beats
            while True:
                async with asyncio.timeout(period_s * 2):
                    await asyncio.sleep(period_s)
                beats += 1

        tasks = [asyncio.create_task(beat(period_s)) for period_s in (1, 5, 10)]
        await asyncio.sleep(3600.5)
        for task in tasks:
            task.cancel()
        return beats

    began, began_cpu = time.perf_counter(), time.process_time()
    outcome = run(main)
    took_s, took_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    assert outcome.result == 3600 + 720 + 360
    assert outcome.virtual_s == 3600.5
    assert took_cpu_s < 0.2
    assert took_s < 5  # other programs may share the processor, but nothing here waits


def test_timers_run_by_time_and_at_one_time_in_the_order_they_were_set() -> None:
    async def main(simulation: Any) -> list[str]:
        loop, log = simulation.loop, []
        for number in range(20):
            loop.call_at(2.0, log.append, f"two {number}")
            loop.call_at(1.0, log.append, f"one {number}")
            loop.call_at(-5.0, log.append, f"past {number}")
            loop.call_soon(log.append, f"soon {number}")
        await asyncio.sleep(3)
        return log

    names = ("soon", "past", "one", "two")
    assert run(main).result == [f"{name} {number}" for name in names for number in range(20)]


def test_the_clock_stands_while_anything_is_ready() -> None:
    async def main(simulation: Any) -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        assert simulation.loop.time() == 0
        await asyncio.sleep(1.25)
        assert simulation.loop.time() == 1.25

    run(main)


def test_what_is_always_ready_keeps_neither_timers_nor_the_end_waiting() -> None:
    async def main(simulation: Any) -> list[str]:
        log: list[str] = []

        async def spin() -> None:
            while True:
                log.append("spin")
                await asyncio.sleep(0)

        task = asyncio.create_task(spin())
        await asyncio.sleep(0)
        due = simulation.loop.create_future()
        simulation.loop.call_at(simulation.loop.time(), due.set_result, None)
        await due
        assert not task.done()
        return log

    assert 2 <= len(run(main, max_callbacks=1000).result) <= 4


def test_cancelled_timers_neither_run_nor_pile_up_nor_move_the_clock() -> None:
    async def main(simulation: Any) -> int:
        loop = simulation.loop
        most = 0
        for _ in range(20 * PURGE_CANCELLED_ABOVE):
            loop.call_later(900, pytest.fail, "a cancelled timer ran").cancel()
            await asyncio.sleep(0.001)
            most = max(most, len(loop._scheduled))
        timer = loop.call_later(0, lambda: None)
        await asyncio.sleep(0.001)
        timer.cancel()  # it has run: not in the heap any more
        assert loop._cancelled_timers == sum(entry[2].cancelled() for entry in loop._scheduled)
        assert loop.time() < 10
        return most

    assert run(main).result < 3 * PURGE_CANCELLED_ABOVE


def test_a_time_that_is_no_number_is_refused() -> None:
    async def main(simulation: Any) -> None:
        await asyncio.sleep(float("nan"))

    with pytest.raises(ValueError, match="not a number"):
        run(main)


# What cannot go on.


async def wait_for_nothing() -> None:
    await asyncio.get_running_loop().create_future()


def test_a_deadlock_names_every_task_and_where_it_waits() -> None:
    async def main(simulation: Any) -> None:
        async def worker(queue: asyncio.Queue[int]) -> None:
            await queue.get()

        await asyncio.sleep(2)
        child = asyncio.create_task(worker(asyncio.Queue()), name="worker-7")
        idler = asyncio.create_task(wait_for_nothing(), name="idler")
        await child
        await idler

    with pytest.raises(SimulationStalled) as raised:
        run(main, seed=12)
    text = str(raised.value)
    assert "at 2 s" in text
    assert "3 unfinished task(s)" in text
    assert "wait_for_nothing (" in text
    line = wait_for_nothing.__code__.co_firstlineno + 1
    assert f"test_loop.py:{line}) > a future" in text
    assert "main (" in text.split("task-1: ")[1]
    assert "> task worker-7" in text
    assert "worker (" in text.split("worker-7: ")[1]
    assert "Queue.get (" in text
    assert "seed 12" in raised.value.__notes__[0]


def test_waiting_until_the_end_of_time_is_a_deadlock() -> None:
    async def main(simulation: Any) -> None:
        await asyncio.sleep(float("inf"))

    with pytest.raises(SimulationStalled):
        run(main)


def test_the_limits_stop_a_run_that_does_not_end() -> None:
    async def ever(simulation: Any) -> None:
        while True:
            await asyncio.sleep(1)

    async def spin(simulation: Any) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(SimulationLimit, match="100 virtual s is reached"):
        run(ever, max_virtual_s=100)
    with pytest.raises(SimulationLimit, match="1000 callbacks ran") as raised:
        run(spin, max_callbacks=1000)
    assert "spin (" in str(raised.value)


def test_a_task_shows_where_it_stands_even_inside_generators() -> None:
    async def main(simulation: Any) -> str:
        async def numbers() -> Any:
            await asyncio.sleep(1)
            yield 1

        async def consume() -> None:
            async for _ in numbers():
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        shown = describe_wait(task)
        await task
        return shown + describe_wait(task)

    assert "consume (" in run(main).result


REFUSED = [
    *("getaddrinfo", "create_connection", "create_server", "create_unix_server", "create_unix_connection"),
    *("create_datagram_endpoint", "add_reader", "add_writer", "sock_recv", "sock_sendall", "sock_connect"),
    *("connect_read_pipe", "subprocess_exec", "subprocess_shell", "add_signal_handler", "run_in_executor"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_the_outside_is_refused_by_name(name: str) -> None:
    async def main(simulation: Any) -> None:
        await getattr(simulation.loop, name)("anything", "at", "all")

    with pytest.raises(SimulationError, match=name + r".*the World"):
        run(main)


def test_threads_are_refused() -> None:
    async def to_thread(simulation: Any) -> None:
        await asyncio.to_thread(print, "never")

    async def from_thread(simulation: Any) -> None:
        errors: list[Exception] = []

        def intrude() -> None:
            try:
                simulation.loop.call_soon_threadsafe(print, "never")
            except SimulationError as error:
                errors.append(error)

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        raise errors[0]

    with pytest.raises(SimulationError, match="run_in_executor"):
        run(to_thread)
    with pytest.raises(SimulationError, match="another thread"):
        run(from_thread)


# How a run ends.


def test_what_the_main_coroutine_leaves_is_cancelled_oldest_first() -> None:
    log: list[str] = []

    async def linger(name: str) -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            log.append(name)

    async def generate(name: str) -> Any:
        try:
            yield name
        finally:
            log.append(name)

    async def main(simulation: Any) -> list[Any]:
        tasks = [asyncio.create_task(linger(f"task {number}")) for number in range(5)]
        generators = [generate(f"generator {number}") for number in range(5)]
        for generator in generators:
            await anext(generator)
        await asyncio.sleep(0)
        return [*tasks, *generators]

    outcome = run(main)
    assert outcome.virtual_s == 0
    assert log == [f"{kind} {number}" for kind in ("task", "generator") for number in range(5)]


def test_errors_that_nobody_notices_fail_the_run() -> None:
    async def task_dies(simulation: Any) -> None:
        async def die() -> None:
            raise ZeroDivisionError("in the background")

        task = asyncio.create_task(die())
        del task
        await asyncio.sleep(1)

    async def callback_dies(simulation: Any) -> None:
        simulation.loop.call_soon(int, "x")
        await asyncio.sleep(1)

    async def dies_at_the_end(simulation: Any) -> None:
        async def die() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                raise ZeroDivisionError("when cancelled")

        task = asyncio.create_task(die())
        del task
        await asyncio.sleep(1)

    async def generator_dies(simulation: Any) -> Any:
        async def generate() -> Any:
            try:
                yield
            finally:
                raise ZeroDivisionError("when closed")

        generator = generate()
        await anext(generator)
        return generator

    for main in (task_dies, dies_at_the_end, generator_dies):
        with pytest.raises(UnhandledErrors, match="seed 5") as raised:
            run(main, seed=5)
        assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError]
    with pytest.raises(UnhandledErrors) as raised:
        run(callback_dies)
    assert [type(error) for error in raised.value.exceptions] == [ValueError]


def test_a_failing_run_says_with_which_seed_and_what_else_went_wrong() -> None:
    async def main(simulation: Any) -> None:
        simulation.loop.call_soon(int, "x")
        await asyncio.sleep(1.5)
        raise KeyError("the first error")

    with pytest.raises(KeyError) as raised:
        run(main, seed=99)
    notes = "\n".join(raised.value.__notes__)
    assert "seed 99, 1.5 virtual s" in notes
    assert "ValueError" in notes


def test_a_task_that_will_not_be_cancelled_is_a_failure() -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    async def main(simulation: Any) -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.wait([task], timeout=5)

    with pytest.raises(SimulationLimit, match="stubborn"):
        run(main)


# The same again.


def test_the_trace_hash_sees_events_and_times() -> None:
    def traced(*events: tuple[float, str | int | bytes]) -> str:
        async def main(simulation: Any) -> None:
            world = simulation.world("host")
            for delay_s, event in events:
                await asyncio.sleep(delay_s)
                world.trace("event", event)

        return run(main).trace_hash

    base = traced((1, "a"), (1, "b"))
    assert traced((1, "a"), (1, "b")) == base
    different = [
        traced((1, "b"), (1, "a")),
        traced((1, "a"), (1.0000001, "b")),
        traced((1, "a")),
        traced((2, "ab")),
    ]
    different += [traced((1, b"a"), (1, "b")), traced((1, "a"), (1, "b"), (0, 1))]
    assert len({base, *different}) == 7

    async def sleeps(simulation: Any) -> None:
        await asyncio.sleep(simulation.random.stream("sleep").random())

    assert len({run(sleeps, seed=seed).trace_hash for seed in range(5)}) == 5


def test_kept_events_have_their_times() -> None:
    async def main(simulation: Any) -> None:
        simulation.loop.trace("first", 1)
        await asyncio.sleep(0.5)
        simulation.loop.trace("second", None, True)

    assert run(main, keep_trace=True).events == ((0.0, "first", 1), (0.5, "second", None, True))
    assert run(main).events == ()


CHAOS = """
import asyncio, sys
from headrace.sim import LinkProfile, run
from headrace.world import ConnectionLost

async def main(simulation):
    loop, chance = simulation.loop, simulation.random.stream("scenario")
    class Oops(Exception): pass

    async def echo(connection):
        while data := await connection.read(4096):
            connection.write(data)
            await connection.drain()

    async def talk(number):
        world = simulation.world(f"client-{number}")
        try:
            connection = await world.network.connect("server:80", timeout_s=5)
            for _ in range(20):
                connection.write(bytes(chance.randint(1, 20000)))
                await connection.drain()
                await asyncio.sleep(world.random.stream("think").random())
                await connection.read(4096)
            await connection.close()
        except (ConnectionLost, ConnectionError) as error:
            world.trace("failed", number, str(error))
        except asyncio.CancelledError:
            world.trace("cancelled", number)
            raise

    async def fail():
        await asyncio.sleep(9)
        raise Oops

    listener = await simulation.world("server").network.listen("server:80", echo)
    for number in range(12):
        simulation.network.host(f"client-{number}")
    loop.call_later(1, simulation.network.partition, "server", "client-1")
    loop.call_later(3, simulation.network.heal, "server", "client-1")
    loop.call_later(2, simulation.network.break_connections, "client-2", "server")
    loop.call_later(4, simulation.network.crash_host, "client-3")
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(talk(number))
            group.create_task(fail())
    except* Oops:
        loop.trace("group ended")
    done, _ = await asyncio.wait([asyncio.create_task(asyncio.sleep(0, n)) for n in range(20)])
    loop.trace("done", *(task.result() for task in done))

noise = [object() for _ in range(int(sys.argv[1]))]
for seed in range(3):
    outcome = run(main, seed=seed, link=LinkProfile(jitter_s=0.01))
    print(seed, outcome.trace_hash, outcome.virtual_s, outcome.callbacks)
"""


def test_a_seed_gives_the_same_run_in_any_process() -> None:
    def play(hash_seed: str, noise: int) -> list[str]:
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed, PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-c", CHAOS, str(noise)]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    first = play("1", 0)
    assert len({line.split()[1] for line in first}) == 3
    assert play("2", 1001) == first
    assert play("77", 12345) == first


def test_finalizers_run_at_the_same_place_whatever_else_is_allocated() -> None:
    def play(noise: int) -> str:
        async def abandon(trace: Callable[..., None], number: int) -> None:
            async def generate() -> Any:
                try:
                    yield me
                finally:
                    trace("finalized", number)

            me: list[Any] = []
            generator = generate()
            me.append(generator)  # a cycle: only the collector can end it
            await anext(generator)

        async def main(simulation: Any) -> None:
            kept: list[list[int]] = []
            for number in range(400):
                await abandon(simulation.loop.trace, number)
                kept += [[] for _ in range(noise)]
                simulation.loop.trace("step", number)

        return run(main).trace_hash

    assert play(0) == play(7) == play(50)


def test_garbage_is_collected_during_a_run_and_the_collector_is_left_as_it_was() -> None:
    alive = 0
    most = 0

    class Heavy:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            self.me = self

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    async def main(simulation: Any) -> None:
        for _ in range(120_000):
            Heavy()
            await asyncio.sleep(0)

    assert gc.isenabled()
    run(main)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert alive == 0
    assert most <= 50_001


def test_the_core_needs_no_torch() -> None:
    check = "import sys, headrace.sim, headrace.protocol.channel; sys.exit('torch' in sys.modules)"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    assert subprocess.run([sys.executable, "-c", check], env=environment, check=False).returncode == 0
