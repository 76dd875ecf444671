"""SIGTERM and SIGINT of a process that serves: the one place that knows how they reach its event loop.

In: what is to be done. Out: a call of it for each signal. It must not know what a signal means.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

ENDING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """While inside, each signal is a call on the running loop; afterwards they are ignored.

    Whoever leaves has cleaned up and is about to end, and ends well whatever else comes.
    """

    def __init__(self, on_signal: Callable[[signal.Signals], None]) -> None:
        self._on_signal = on_signal

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, self._on_signal, number)

    def __exit__(self, *exception: object) -> None:
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
