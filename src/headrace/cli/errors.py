"""How a command fails: one line on standard error and exit code 1, or 130 for Ctrl-C. No traceback.

What is not foreseen here is a defect and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can mend into words."""
    from headrace.cluster import EngineLostError, StartFailedError
    from headrace.store import ModelError
    from headrace.text import TextError

    try:
        yield
    except (ModelError, TextError, StartFailedError, EngineLostError, ValueError, OSError) as error:
        print(f"headrace: error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
