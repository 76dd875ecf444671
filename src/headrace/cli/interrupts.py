"""Ctrl-C and SIGTERM in a command that does not serve: one line and exit code 130, or 143 and no word.

While modules load nothing is there that could be left behind, and Ctrl-C ends the process at once. Inside
`interruptible` it raises, so that what the command has begun is cleaned up. Next to nothing is imported here:
there is hardly a moment before it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
_STDERR = 2
_WORDS = "headrace: interrupted"


def take_interrupts() -> None:
    """Let Ctrl-C end this process at once; where whoever started it has SIGINT ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        atexit.register(_too_late)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; what comes out of the block becomes exit code 130."""
    taken = signal.getsignal(signal.SIGINT) is _end
    try:
        if taken:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except KeyboardInterrupt:
        print(_WORDS, file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    finally:
        if taken:
            signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def leaving_on(*signals: signal.Signals) -> Iterator[None]:
    """Inside, each of these unwinds the stack and ends the process with 128 and its number."""
    before = {number: signal.signal(number, _leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _too_late() -> None:
    """All is done, and the interpreter ends: it would give SIGINT back to the kernel, which kills."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: object) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads
        os.write(_STDERR, _WORDS.encode() + b"\n")
    os._exit(INTERRUPTED)
