"""A retried request gets its first answer, and never runs twice."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from api_house import ApiHouse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.api.idempotency import Idempotency, Limits

TEXT = "/v1/completions"
BODY = {"prompt": [300, 301], "max_tokens": 20, "ignore_eos": True}


def key(name: str) -> dict[str, str]:
    return {"Idempotency-Key": name}


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_gets_the_first_answer(http: httpx.Client, stream: bool) -> None:
    body = {**BODY, "stream": stream}
    first = http.post(TEXT, json=body, headers=key(f"again-{stream}"))
    second = http.post(TEXT, json=body, headers=key(f"again-{stream}"))
    assert first.status_code == second.status_code == 200
    assert first.content == second.content  # the seed is drawn at random, and the id is
    assert first.headers["content-type"] == second.headers["content-type"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert http.post(TEXT, json=body, headers=key(f"new-{stream}")).content != first.content
    assert http.post(TEXT, json=body).content != first.content


def test_a_key_with_another_body_is_refused_and_another_path_is_another_request(http: httpx.Client) -> None:
    assert http.post(TEXT, json=BODY, headers=key("one")).status_code == 200
    answer = http.post(TEXT, json={**BODY, "max_tokens": 5}, headers=key("one"))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert http.post("/tokenize", json={"prompt": "a"}, headers=key("one")).status_code == 200
    for bad in ("", "x" * 256, "a b"):
        assert http.post(TEXT, json=BODY, headers=key(bad)).status_code == 400


def test_an_error_is_not_kept(house: ApiHouse, http: httpx.Client) -> None:
    body = {**BODY, "max_tokens": 400, "timeout": 1e-6}
    for _ in range(2):
        answer = http.post(TEXT, json=body, headers=key("late"))
        assert answer.status_code == 408
        assert "idempotent-replayed" not in answer.headers


def test_a_client_that_left_finds_its_answer(house: ApiHouse, http: httpx.Client) -> None:
    body = {**BODY, "max_tokens": 300, "stream": True}
    with http.stream("POST", TEXT, json=body, headers=key("left")) as answer:
        begun = next(answer.iter_lines())
    again = http.post(TEXT, json=body, headers=key("left"))
    assert again.headers["idempotent-replayed"] == "true"
    lines = again.text.splitlines()
    assert lines[0] == begun
    assert lines[-2] == "data: [DONE]"


# ---- the layer alone, over an application that the test holds ------------------------------------------


class Application:
    """Answers with a number that counts its runs, when `go` is set."""

    def __init__(self, status: int = 200, size: int = 1, state: str | None = None) -> None:
        self.go = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.runs = 0
        self.status, self.size, self.state = status, size, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.runs += 1
        run = self.runs
        await receive()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.state is not None:
            scope["state"][self.state] = True
        if self.status == 0:
            raise ZeroDivisionError
        await Response(str(run) * self.size, self.status)(scope, receive, send)


async def ask(layer: Idempotency, name: str, authorization: str = "") -> str:
    transport = httpx.ASGITransport(layer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {**key(name), "Authorization": authorization}
        return (await client.post("/", content=b"body", headers=headers)).text


def test_whoever_asks_while_it_runs_joins_it_and_callers_share_nothing() -> None:
    async def main() -> None:
        app = Application()
        layer = Idempotency(app)
        asked = [asyncio.create_task(ask(layer, "k")) for _ in range(3)]
        other = asyncio.create_task(ask(layer, "k", "Bearer other"))
        while app.runs < 2:
            await asyncio.sleep(0)
        app.go.set()
        assert len(set(await asyncio.gather(*asked))) == 1
        assert await other != await asked[0]
        assert app.runs == 2

    asyncio.run(main())


def test_a_run_that_everybody_left_is_cancelled_after_its_grace() -> None:
    async def main() -> None:
        app = Application()
        layer = Idempotency(app, Limits(grace_s=0))
        asked = [asyncio.create_task(ask(layer, "k")) for _ in range(2)]
        while app.runs < 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        asked[0].cancel()
        await asyncio.gather(asked[0], return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not app.cancelled.is_set(), "one still waits"
        asked[1].cancel()
        await asyncio.wait_for(app.cancelled.wait(), 10)
        app.go.set()
        assert await ask(layer, "k") == "2"
        assert await ask(layer, "k") == "2"

    asyncio.run(main())


@pytest.mark.parametrize(
    "application", [{"status": 503}, {"status": 400}, {"state": "failed"}, {"status": 0}]
)
def test_only_good_answers_are_kept(application: dict[str, Any]) -> None:
    async def main() -> None:
        app = Application(**application)
        layer = Idempotency(app)
        app.go.set()
        for runs in (1, 2):
            if application.get("status") == 0:
                with pytest.raises(ZeroDivisionError):
                    await ask(layer, "k")
            else:
                assert await ask(layer, "k") == str(runs)
            assert app.runs == runs

    asyncio.run(main())


def test_what_is_kept_is_bounded_in_number_size_and_time() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        app = Application(size=10)
        app.go.set()
        layer = Idempotency(app, Limits(answers=3, total_bytes=25, ttl_s=60), lambda: now)

        async def kept(name: str) -> bool:
            before = app.runs
            await ask(layer, name)
            return app.runs == before

        assert not await kept("a")
        assert not await kept("b")
        assert await kept("a")
        assert await kept("b")
        assert not await kept("c")  # 30 bytes: the oldest goes
        assert await kept("b")
        assert not await kept("a")
        app.size = 1
        for name in "xyz":
            assert not await kept(name)
        assert not await kept("c")  # the fourth of three
        assert await kept("z")
        app.size = 30
        assert not await kept("large")
        assert not await kept("large")
        now = 60.0
        assert not await kept("z")

    asyncio.run(main())


def test_an_abandoned_run_that_ends_well_keeps_off_the_next_one() -> None:
    async def main() -> None:
        ends = [asyncio.Event(), asyncio.Event()]
        began: list[int] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            number = len(began)
            began.append(number)
            while not ends[number].is_set():
                try:
                    await ends[number].wait()
                except asyncio.CancelledError:
                    continue  # it goes on, whoever left
            await Response(str(number))(scope, receive, send)

        layer = Idempotency(app, Limits(grace_s=0))
        first = asyncio.create_task(ask(layer, "k"))
        while len(began) < 1:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        async with asyncio.timeout(10):
            while layer._runs:
                await asyncio.sleep(0)
        second = asyncio.create_task(ask(layer, "k"))
        while len(began) < 2:
            await asyncio.sleep(0)
        running = next(iter(layer._runs.values()))
        ends[0].set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert next(iter(layer._runs.values())) is running
        ends[1].set()
        assert await second == "1"
        assert await ask(layer, "k") == "1"

    asyncio.run(main())
