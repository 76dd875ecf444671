"""The control plane: what accepts requests, hands them to engines, and answers for their endings.

In: typed requests from HTTP or the command line. Out: streams of outputs with exactly one ending for each
sample. It must not know HTTP, text, torch, or whether its world is real.
"""

from headrace.cluster.gateway import Gateway
from headrace.cluster.keeper import WorkerLostError
from headrace.cluster.local import LocalCluster
from headrace.cluster.observer import Ending, GatewayObserver
from headrace.cluster.readiness import GatewayState, StartFailedError
from headrace.cluster.stream import OutputStream

__all__ = [
    "Ending",
    "Gateway",
    "GatewayObserver",
    "GatewayState",
    "LocalCluster",
    "OutputStream",
    "StartFailedError",
    "WorkerLostError",
]
