"""The worker: one engine in a process of its own, and the loop that feeds it from its control channel.

In: an engine, and the messages of the gateway it dials. Out: outputs and endings as messages. It must not
know HTTP, text, or how the engine computes; only `main`, the process's entry, puts an engine together.
"""

from headrace.worker.loop import report_start_failure, serve

__all__ = ["report_start_failure", "serve"]
