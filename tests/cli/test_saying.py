"""What people are told ends no process, wherever it goes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

import headrace.cli.http_options
import headrace.worker.process


class Refusing(io.StringIO):
    """A stream that nobody reads, or on a full disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
@pytest.mark.parametrize(
    ("stream", "say"),
    [("stderr", headrace.cli.http_options.say), ("stdout", headrace.worker.process._say)],
)
def test_words_that_cannot_be_written(
    stream: str, say: Callable[[str], None], error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, stream, Refusing(error))
    say("first")
    say("second")
