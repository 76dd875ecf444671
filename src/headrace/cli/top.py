"""`headrace top`: a running server, live in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.cluster import DEFAULT_URL, ApiKey, Url, width_of_text
from headrace.cli.errors import clear_errors

if TYPE_CHECKING:
    from headrace.observe.top.source import Source

ONCE_S = 1.0
"""Between the two readings that a single frame's rates are of."""


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame as text, and end.")] = False,
    width: Annotated[
        int | None,
        typer.Option(
            min=40,
            help="Columns of that frame.",
            show_default="the terminal's; else COLUMNS, or 160",
        ),
    ] = None,
) -> None:
    """Watch a server: pools, queues, KV usage, latencies against the SLO, transfers. q ends it."""
    with clear_errors():
        from headrace.observe.top.source import Source

        source = Source(url, api_key)
        if once:
            _print_one(source, width)
            return
        if width is not None:
            raise ValueError("--width is of the frame that --once prints; the live view has the terminal's")
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError("top draws on a terminal, and this is none; --once prints one frame as text")
        from headrace.observe.top.app import TopApp

        TopApp(source.read, source.url, interval).run()


def _print_one(source: Source, width: int | None) -> None:
    """Percentiles and counts since the server's start, rates over a second."""
    from rich.console import Console

    from headrace.observe.top.frame import History
    from headrace.observe.top.layout import headline, layout

    history = History()
    history.add(source.read())
    time.sleep(ONCE_S)
    history.add(source.read())
    frame = history.frame(since_start=True)
    assert frame is not None  # there are readings
    console = Console(width=width or width_of_text(), highlight=False)
    console.print(headline(frame, source.url))
    console.print()
    console.print(layout(frame, console.width))
