"""The command line: one module per command, each of which parses, calls and prints.

In: arguments. Out: text for people, or JSON for programs. It must not hold logic that a program could want.
"""

from __future__ import annotations

import sys
import time

STARTED_S = time.monotonic()
"""When this process began to be ours; start-up times are counted from here."""


SERVING = ("serve", "gateway", "worker")
"""Commands that run until they are told to end, by whoever started them."""


def main() -> None:
    """The command `headrace`."""
    if sys.argv[1:2] and sys.argv[1] in SERVING:
        from headrace.cli.early import take_signals

        take_signals()
    else:
        from headrace.cli.interrupts import take_interrupts

        take_interrupts()
    from headrace.cli.app import app

    app(prog_name="headrace")


__all__ = ["STARTED_S", "main"]
