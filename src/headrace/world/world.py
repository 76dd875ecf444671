"""The World: the one object through which control and engine code reaches the outside.

Code that takes its clock, its chance and its network from here runs unchanged on real machines
(`real_world`) and in a simulation (`headrace.sim.run`), where time is virtual and the network has faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from headrace.world.agent import OpenAgent
from headrace.world.network import Network
from headrace.world.nixl import open_nixl
from headrace.world.random import RandomStreams
from headrace.world.shared_memory import open_shared_memory
from headrace.world.streams import StreamNetwork

if TYPE_CHECKING:
    from headrace.world.credentials import Credentials


class Memory(Protocol):
    """Memory that another process made."""

    buffer: memoryview

    def close(self) -> None:
        """Let go of it."""


TraceValue = str | int | float | bool | bytes | None


def _discard(*event: TraceValue) -> None:
    """Production keeps no trace."""


@dataclass(frozen=True)
class World:
    """Network, chance, clock and trace of one host."""

    network: Network
    random: RandomStreams
    trace: Callable[..., None] = _discard
    """`trace("router.choose", request_id, worker)`: an event of TraceValues for the run's trace.

    A simulation hashes the events, so that two runs of one seed can be compared; production drops them.
    """

    open_memory: Callable[[str, int], Memory] = open_shared_memory
    """The memory of another process of this host, by its path and size. Raises OSError."""

    open_agent: OpenAgent = open_nixl
    """Raises AgentUnavailable."""

    def now(self) -> float:
        """The running loop's clock in seconds: monotonic, of no particular origin."""
        return asyncio.get_running_loop().time()


def real_world(
    credentials: Credentials | None = None, report: Callable[[str], None] = lambda line: None
) -> World:
    """The world of this process: sockets, the operating system's entropy, the real clock.

    With `credentials`, TCP connections are mutual TLS; `report` gets a line for people of who was not let in.
    """
    return World(network=StreamNetwork(credentials, report), random=RandomStreams.from_os())
