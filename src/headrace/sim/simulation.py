"""One simulated run from beginning to end: a loop, a network, a world for each host, and the outcome.

In: a coroutine function and a seed. Out: its result, how much virtual time went by, and a hash over all that
was traced, which is equal for equal seeds. It must not know what is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from headrace.sim.agent import SimAgent
from headrace.sim.link import DATACENTRE, LOOPBACK, LinkProfile
from headrace.sim.loop import CALLBACKS_PER_COLLECTION, SimulationError, VirtualLoop, collected_by_count
from headrace.sim.network import PACKETS, RETRANSMISSION_TIMEOUT_S, WINDOW_BYTES, SimNetwork, Wiring
from headrace.world import AgentUnavailable, Memory, MemoryAgent, RandomStreams, TraceValue, World

T = TypeVar("T")

AGENT_PORTS = 20_000
"""Where memory agents listen, each at a port of its own, from this one on."""

CLEANUP_CALLBACKS = 100_000
"""How many callbacks the cancelled tasks may take to end before the run is declared stuck."""


class UnhandledErrors(ExceptionGroup[Exception]):
    """Errors that no task of the run took notice of: a background task died, a callback raised."""


@dataclass(frozen=True)
class Simulation:
    """What the main coroutine of a run works with."""

    loop: VirtualLoop
    random: RandomStreams
    """For the scenario itself: arrivals, faults. Hosts have streams of their own."""
    network: SimNetwork
    """To make faults; programs use `world(host).network`."""
    memories: dict[str, Memory] = field(default_factory=dict)
    """What programs share with others of their host, by path."""
    _started: Counter[str] = field(default_factory=Counter)
    _ports: Iterator[int] = field(default_factory=functools.partial(itertools.count, AGENT_PORTS))

    def world(self, host: str) -> World:
        """The world of a program that starts on `host` now; no two programs draw the same numbers.

        Start it `on` that host where clocks are to differ.
        """
        self._started[host] += 1
        return World(
            network=self.network.host(host),
            random=self.random.scope(f"host {host}, program {self._started[host]}"),
            trace=self.loop.trace,
            open_memory=self._open_memory,
            open_agent=functools.partial(self._open_agent, host),
        )

    def on(self, host: str) -> AbstractContextManager[None]:
        """Within the block, what runs reads the clock of `host`, as its programs must from their start."""
        return self.network.clock(host).here()

    def _open_memory(self, path: str, size: int) -> Memory:
        memory = self.memories.get(path)
        if memory is None or memory.buffer.nbytes != size:
            raise OSError(f"there is no memory of {size} bytes at {path}")
        return memory

    async def _open_agent(
        self,
        host: str,
        path: str,
        size: int,
        address: str,
        report: Callable[[str], None],
        *,
        open_to_network: bool = False,
    ) -> MemoryAgent:
        """Between simulated hosts, whether it may be on the network or not: all of them stand for one."""
        try:
            memory = self._open_memory(path, size)
        except OSError as error:
            raise AgentUnavailable(str(error)) from error
        agent = SimAgent(self.network.host(host), memory, host, self._ports)
        await agent.listen()
        return agent


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a run."""

    result: T
    virtual_s: float
    """When the main coroutine returned."""
    callbacks: int
    trace_hash: str
    """Over the whole run, the cancellation of what was left included."""
    events: tuple[tuple[TraceValue, ...], ...]
    """The traced events, each with its time, if they were kept."""


def run(
    main: Callable[[Simulation], Coroutine[Any, Any, T]],
    *,
    seed: int = 0,
    link: LinkProfile = DATACENTRE,
    loopback: LinkProfile = LOOPBACK,
    wiring: Callable[[VirtualLoop], Wiring] = lambda loop: PACKETS,
    window_bytes: int = WINDOW_BYTES,
    retransmission_timeout_s: float = RETRANSMISSION_TIMEOUT_S,
    max_virtual_s: float = math.inf,
    max_callbacks: int | None = None,
    keep_trace: bool = False,
    callbacks_per_collection: int = CALLBACKS_PER_COLLECTION,
) -> Outcome[T]:
    """Run `main(simulation)` in virtual time until it returns, then cancel the tasks it left.

    Raises what `main` raises, with a note of the seed; SimulationStalled or SimulationLimit when it cannot
    end; UnhandledErrors when it returns but other parts of the run failed unnoticed.
    """
    loop = VirtualLoop(keep_trace=keep_trace, callbacks_per_collection=callbacks_per_collection)
    loop.limit(max_virtual_s=max_virtual_s, max_callbacks=max_callbacks)
    random = RandomStreams(seed)
    network = SimNetwork(
        loop,
        random.scope("network"),
        link=link,
        loopback=loopback,
        wiring=wiring(loop),
        window_bytes=window_bytes,
        retransmission_timeout_s=retransmission_timeout_s,
    )
    unhandled: list[Exception] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(_unhandled(context)))
    with collected_by_count():
        try:
            result = loop.run_until_complete(main(Simulation(loop, random, network)))
            virtual_s = loop.time()
            _end_tasks(loop)
        except BaseException as error:
            error.add_note(f"simulation: seed {seed}, {loop.time():g} virtual s, trace {loop.trace_hash()}")
            with contextlib.suppress(SimulationError):  # the first error is the one to tell
                _end_tasks(loop)
            for other in unhandled:
                error.add_note(f"unhandled before: {other!r}")
            raise
        finally:
            loop.close()
    if unhandled:
        raise UnhandledErrors(f"simulation with seed {seed}: the main coroutine returned, but", unhandled)
    return Outcome(result, virtual_s, loop.callbacks, loop.trace_hash(), tuple(loop.events or ()))


def _end_tasks(loop: VirtualLoop) -> None:
    """Cancel what is left and wait for it; what it raises now is as unhandled as it was before."""
    loop.limit(max_callbacks=loop.callbacks + CLEANUP_CALLBACKS)
    while tasks := loop.tasks():
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                message = f"task {task.get_name()} failed when it was cancelled at the end"
                loop.call_exception_handler({"message": message, "exception": error})
    loop.run_until_complete(loop.shutdown_asyncgens())


def _unhandled(context: dict[str, Any]) -> Exception:
    error = context.get("exception")
    message = context.get("message", "an error without a message")
    if not isinstance(error, Exception):
        return RuntimeError(f"{message}: {error!r}" if error is not None else message)
    error.add_note(message)
    return error
