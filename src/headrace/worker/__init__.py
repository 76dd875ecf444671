"""A worker: an engine process that steps, and a supervisor process that is its membership in the cluster.

    gateway ══ control channel ══ supervisor ══ unix socket ══ engine process
                                      ║                           │
    other workers ══ KV blocks ═══════╝ ─ ─ ─ shared memory ─ ─ ─ ┘

In: an engine, and the messages of the gateways it dials. Out: outputs and endings as messages. It must not
know HTTP, text, or how the engine computes; only `main`, the engine process's entry, puts an engine together.
"""

from headrace.worker.life import CannotStartError
from headrace.worker.loop import report_start_failure, serve
from headrace.worker.options import WorkerOptions
from headrace.worker.session import RejectedError
from headrace.worker.supervisor import EngineLostError, Supervisor

__all__ = [
    "CannotStartError",
    "EngineLostError",
    "RejectedError",
    "Supervisor",
    "WorkerOptions",
    "report_start_failure",
    "serve",
]
