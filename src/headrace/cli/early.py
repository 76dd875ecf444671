"""A command that serves, before it serves: SIGTERM and SIGINT end it at once, with one line and exit code 0.

From its first moment, while modules load and nothing is there yet that could be left behind, to the moment
when whoever serves takes the signals. It imports next to nothing, so that there is hardly a moment before it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class _Unwind(BaseException):
    """A signal came where there is something to clean up."""


def take_signals() -> None:
    """End this process well when a signal comes."""
    for number in ENDING:
        signal.signal(number, _stop)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside, a signal raises, so that what is half made is removed; then the process ends as before.

    Where nobody has called `take_signals` it does nothing.
    """
    if signal.getsignal(signal.SIGTERM) is not _stop:
        yield
        return
    for number in ENDING:
        signal.signal(number, _unwind)
    try:
        yield
    except _Unwind:
        _stop()
    finally:
        take_signals()


def _unwind(number: int, frame: object) -> NoReturn:
    take_signals()  # a second one does not wait for the cleaning
    raise _Unwind


def _stop(number: int = 0, frame: object = None) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads
        os.write(_STDERR, b"stopped\n")
    os._exit(0)
