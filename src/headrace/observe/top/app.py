"""The live view: a screen that follows a server, and keeps following while the server is away.

In: a function that reads the server. Out: a screen, until q or Ctrl-C. Reading is done in a thread, so that
keys are answered while a server is slow.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import datetime
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.widgets import Footer, Static

from headrace.observe.top.frame import Frame, History
from headrace.observe.top.layout import headline, layout
from headrace.observe.top.reading import Reading


class TopApp(App[None]):
    """Shows what `read` gives, each `interval_s` seconds."""

    CSS = """
    #head { height: auto; padding: 0 1; }
    #away { height: auto; padding: 0 1; background: $error; color: $text; display: none; }
    #body { padding: 1 1 0 1; }
    #body.away { text-style: dim; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [  # textual reads it
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
        Binding("space", "pause", "Pause"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, read: Callable[[], Reading], where: str, interval_s: float) -> None:
        """`read` raises OSError with why there is nothing; `where` is what the server is called."""
        super().__init__()
        self._read = read
        self._where = where
        self._interval_s = interval_s
        self._history = History()
        self._frame: Frame | None = None
        self._paused = False
        # Kept here, for on the way out the screen no longer has them while a reading still comes in.
        self._head = Static(Text(f"asking {where} ..."), id="head")
        self._away = Static(id="away")
        self._body = Static(id="body")

    def compose(self) -> ComposeResult:
        yield self._head
        yield self._away
        with VerticalScroll():
            yield self._body
        yield Footer()

    def on_mount(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        self.run_worker(self._follow(), name="follow")

    def on_resize(self, event: Resize) -> None:
        self._show()

    def action_pause(self) -> None:
        """Hold what is shown, or go on."""
        self._paused = not self._paused
        self._show()

    async def _follow(self) -> None:
        while True:
            try:
                self._history.add(await asyncio.to_thread(self._read))
            except OSError as error:
                self._tell_away(str(error))
            else:
                self._tell_away("")
                if not self._paused:
                    self._frame = self._history.frame()
                    self._show()
            await asyncio.sleep(self._interval_s)

    def _tell_away(self, why: str) -> None:
        """Say that the server does not answer, and why; empty: that it does."""
        self._away.display = bool(why)
        self._body.set_class(bool(why), "away")
        if why:
            last = "; below is what it said last" if self._frame is not None else ""
            self._away.update(Text(f"{why}. Asking again each {self._interval_s:g} s{last}."))

    def _show(self) -> None:
        if self._frame is None:
            return
        head = headline(self._frame, self._where)
        head.append(f"  {datetime.now():%H:%M:%S}", "dim")
        if self._paused:
            head.append("  paused", "reverse")
        self._head.update(head)
        self._body.update(layout(self._frame, self.size.width - 2))
