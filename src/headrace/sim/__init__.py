"""A whole system in one deterministic program: virtual time, a network with faults, replay from a seed.

In: the coroutines of the real system. Out: what they did, and a trace hash by which two runs are compared.
The core (loop, network, run) knows nothing of models or requests and imports no torch.

    async def main(simulation: Simulation) -> None:
        gateway, worker = simulation.world("gateway"), simulation.world("worker")
        listener = await gateway.network.listen("gateway:7000", serve)
        connection = await worker.network.connect("gateway:7000", timeout_s=5)
        simulation.network.partition("gateway", "worker")
        ...

    outcome = run(main, seed=7)
"""

from headrace.sim.link import LinkProfile
from headrace.sim.loop import SimulationError, SimulationLimit, SimulationStalled, VirtualLoop
from headrace.sim.network import Crash, SimNetwork
from headrace.sim.simulation import Outcome, Simulation, UnhandledErrors, run

__all__ = [
    "Crash",
    "LinkProfile",
    "Outcome",
    "SimNetwork",
    "Simulation",
    "SimulationError",
    "SimulationLimit",
    "SimulationStalled",
    "UnhandledErrors",
    "VirtualLoop",
    "run",
]
