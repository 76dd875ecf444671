"""How a command fails: one line on standard error and exit code 1, 130 for Ctrl-C, 141 when the
reader of its output has gone. No traceback.

What is not foreseen here is a defect and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from headrace.cli.interrupts import interruptible

OUTPUT_CLOSED = 141


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can mend into words."""
    from headrace.cluster import StartFailedError, WorkerLostError
    from headrace.store import ModelError
    from headrace.text import TextError
    from headrace.worker import CannotStartError, EngineLostError, RejectedError

    in_cluster = (StartFailedError, WorkerLostError, CannotStartError, EngineLostError, RejectedError)
    with interruptible():
        try:
            yield
        except BrokenPipeError:  # whoever read the output has gone: what is left of it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(OUTPUT_CLOSED)
        except UnicodeEncodeError as error:
            _fail(f"the output takes only {error.encoding}; set PYTHONIOENCODING=utf-8")
        except (ModelError, TextError, *in_cluster, ValueError, OSError) as error:
            _fail(_one_line(error))


def _fail(text: str) -> NoReturn:
    print(f"headrace: error: {text}", file=sys.stderr, flush=True)
    sys.exit(1)


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(text.split())
