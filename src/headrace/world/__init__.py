"""What the outside looks like to control and engine code: clock, chance and network, real or simulated.

In: nothing of Headrace; this is the bottom floor. Out: `World` and the interfaces it consists of. It must not
know messages, requests or models, and imports no torch.
"""

from headrace.world.agent import AgentUnavailable, MemoryAgent, ReadFailed
from headrace.world.network import ConnectFailed, Connection, ConnectionLost, Handler, Listener, Network
from headrace.world.random import Chance, RandomStreams
from headrace.world.world import Memory, TraceValue, World, real_world

__all__ = [
    "AgentUnavailable",
    "Chance",
    "ConnectFailed",
    "Connection",
    "ConnectionLost",
    "Handler",
    "Listener",
    "Memory",
    "MemoryAgent",
    "Network",
    "RandomStreams",
    "ReadFailed",
    "TraceValue",
    "World",
    "real_world",
]
