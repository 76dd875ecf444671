"""How a run is going: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.live import Live
from rich.text import Text

from headrace.bench.run import Run

ON_TERMINAL_S = 0.25
ELSEWHERE_S = 10.0


class _Meter:
    """The line, with rates over the last second."""

    def __init__(self, run: Run, total: int | None) -> None:
        self._run = run
        self._of = "" if total is None else f" of {total}"
        self._since_s, self._done, self._chunks = 0.0, 0, 0
        self._rates = "- requests/s, - chunks/s"

    def line(self) -> str:
        run = self._run
        at_s, done, chunks = run.elapsed_s, run.ended - run.failed, run.chunks
        if (over_s := at_s - self._since_s) >= 1.0:
            requests_per_s, chunks_per_s = (done - self._done) / over_s, (chunks - self._chunks) / over_s
            self._rates = f"{requests_per_s:.1f} requests/s, {chunks_per_s:.0f} chunks/s"
            self._since_s, self._done, self._chunks = at_s, done, chunks
        states = f"{len(run.under_way)} running, {done}{self._of} done, {run.failed} errors"
        return f"{at_s:.0f} s: {states}; {self._rates}"


async def show(run: Run, total: int | None, console: Console) -> None:
    """Show the progress of `run` until cancelled. `total`: requests that there will be, if that is known.

    A line costs about 0.1 ms; it is drawn on the run's own thread and counted as the generator's cost.
    """
    meter = _Meter(run, total)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(ELSEWHERE_S)
            console.print(meter.line(), markup=False, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(Text(meter.line()), refresh=True)
            await asyncio.sleep(ON_TERMINAL_S)
