"""The live view on a screen of a test: what it shows, a server that goes and comes back, and its keys."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from rich.console import Console
from textual.pilot import Pilot
from textual.widgets import Static
from top_recorded import reading

from headrace.observe.top.app import TopApp
from headrace.observe.top.reading import Reading

WHERE = "http://there:8000"
DEADLINE_S = 30.0


class Server:
    """Answers with the recorded readings in turn, unless it is away."""

    def __init__(self) -> None:
        self.away = ""
        self.asked = 0
        self._at_s = itertools.count(4.0, 4.0)

    def read(self) -> Reading:
        self.asked += 1
        if self.away:
            raise OSError(self.away)
        found = reading(1 if self.asked == 1 else 2)
        return Reading(next(self._at_s), found.cluster, found.values, found.distributions, found.model)


def run(test: Callable[[Pilot[None], Server], Coroutine[Any, Any, None]], size: tuple[int, int]) -> TopApp:
    server = Server()
    app = TopApp(server.read, WHERE, 0.01)

    async def on_screen() -> None:
        async with app.run_test(size=size) as pilot:
            await test(pilot, server)

    asyncio.run(on_screen())
    return app


def shown(pilot: Pilot[None], part: str) -> str:
    console = Console(width=pilot.app.size.width, highlight=False)
    with console.capture() as captured:
        console.print(pilot.app.query_one(f"#{part}", Static).content)
    return captured.get()


async def until(pilot: Pilot[None], met: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not met():
            await pilot.pause(0.01)


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_it_shows_the_server_at_any_size(size: tuple[int, int]) -> None:
    async def test(pilot: Pilot[None], server: Server) -> None:
        await until(pilot, lambda: "last" in shown(pilot, "body"))
        assert "smollm2-135m" in shown(pilot, "head") and WHERE in shown(pilot, "head")
        body = shown(pilot, "body")
        assert "decode-2" in body and "TTFT" in body
        assert ("LEASED" in body) == (size[0] > 100)
        assert not pilot.app.query_one("#away").display
        assert pilot.app.query_one("#body").region.width <= size[0]

    run(test, size)


def test_it_follows_the_terminals_size() -> None:
    async def test(pilot: Pilot[None], server: Server) -> None:
        await until(pilot, lambda: "decode-2" in shown(pilot, "body"))
        assert "LEASED" not in shown(pilot, "body")
        await pilot.resize_terminal(200, 40)
        await until(pilot, lambda: "LEASED" in shown(pilot, "body"))

    run(test, (80, 24))


def test_a_server_that_is_away_is_told_of_and_found_again() -> None:
    async def test(pilot: Pilot[None], server: Server) -> None:
        away = pilot.app.query_one("#away", Static)
        await until(pilot, lambda: bool(away.display))
        assert "no server answers. Asking again each 0.01 s." in shown(pilot, "away")
        server.away = ""
        await until(pilot, lambda: not away.display and "decode-2" in shown(pilot, "body"))
        server.away = "gone again"
        await until(pilot, lambda: bool(away.display))
        assert "gone again" in shown(pilot, "away") and "what it said last" in shown(pilot, "away")
        assert "decode-2" in shown(pilot, "body")

    server = Server()
    server.away = "no server answers"
    app = TopApp(server.read, WHERE, 0.01)

    async def on_screen() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            await test(pilot, server)

    asyncio.run(on_screen())


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_a_key_ends_it(key: str) -> None:
    async def test(pilot: Pilot[None], server: Server) -> None:
        await until(pilot, lambda: "decode-2" in shown(pilot, "body"))
        await pilot.press(key)

    assert run(test, (80, 24)).return_code == 0


def test_space_holds_the_picture() -> None:
    async def test(pilot: Pilot[None], server: Server) -> None:
        await until(pilot, lambda: "last" in shown(pilot, "body"))
        await pilot.press("space")
        assert "paused" in shown(pilot, "head")
        before, asked = shown(pilot, "body"), server.asked
        await until(pilot, lambda: server.asked > asked + 3)
        assert shown(pilot, "body") == before
        await pilot.press("space")
        assert "paused" not in shown(pilot, "head")
        await until(pilot, lambda: shown(pilot, "body") != before)

    run(test, (80, 24))
