"""A real model behind a real server, seen from outside. The tests run in order; the last one stops it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from served import Served

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def served(smollm2_dir: Path) -> Iterator[Served]:
    # A small KV cache, so that all of it has been touched before memory is compared.
    options = ("--max-num-seqs", "32", "--served-model-name", "smol", "--kv-cache-memory", "64MiB")
    with Served(smollm2_dir, *options) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_start_up_says_what_it_does(served: Served) -> None:
    said = "\n".join(served.lines)
    for words in ("smol (llama) from", "kernels", "KV cache for", "32 sequences at once", "ready after"):
        assert words in said, said


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smol", messages=CAPITAL, temperature=0, max_tokens=20, stream=True
    )
    text, finish = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    assert "Paris" in text
    assert finish == "stop"  # the model's own end, before 20 tokens


def test_a_completion_with_logprobs_and_a_stop_string(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smol", prompt="1, 2, 3, 4, 5, 6,", temperature=0, max_tokens=30, logprobs=2, stop=" 9"
    )
    choice = answer.choices[0]
    assert choice.text == " 7, 8,"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert all(-20 < logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    for token, top in zip(choice.logprobs.tokens or [], choice.logprobs.top_logprobs or [], strict=True):
        assert max(top, key=lambda t: top[t]) == token  # greedy takes the likeliest


def test_eight_at_once_and_a_seed_that_repeats(served: Served) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=60) as client:

            async def ask(seed: int) -> str:
                answer = await client.chat.completions.create(
                    model="smol", messages=CAPITAL, seed=seed, max_tokens=16
                )
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*(ask(seed) for seed in range(8)))

    texts = asyncio.run(main())
    assert all(texts)
    assert len(set(texts)) > 1


def test_a_request_that_forbids_every_token_ends_alone(client: openai.OpenAI) -> None:
    everything = list(range(49152))
    with pytest.raises(openai.BadRequestError, match="no token is left to choose"):
        client.completions.create(
            model="smol", prompt="Hi", extra_body={"min_tokens": 1, "stop_token_ids": everything}
        )
    assert client.completions.create(model="smol", prompt="Hi", max_tokens=2).choices[0].text


def test_the_gateway_has_no_torch(served: Served) -> None:
    assert any("libtorch" in region.path for region in served.engine.memory_maps())
    assert not any("libtorch" in region.path for region in served.gateway.memory_maps())


def test_five_hundred_requests_that_come_and_go(served: Served) -> None:
    """Each ends exactly once, all blocks come back, and neither process grows."""
    generator = random.Random(7)
    before = served.wait_quiet()
    whole = left = 0

    async def one(http: httpx.AsyncClient, limit: asyncio.Semaphore) -> None:
        nonlocal whole, left
        chat = generator.random() < 0.5
        words = " ".join(
            generator.choices(["red", "green", "blue", "seven", "and", "tree"], k=generator.randrange(1, 40))
        )
        body: dict[str, Any] = {
            "max_tokens": generator.randrange(1, 12),
            "n": generator.choice([1, 1, 1, 2]),
            "stream": generator.random() < 0.75,
            "temperature": generator.choice([0, 1]),
            "stop": generator.choice([None, ".", [" the", "e"]]),
            **({"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}),
        }
        patience = generator.choice([None, None, 0.0, 0.02, 0.1, 0.4])
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with limit:
            try:
                async with asyncio.timeout(patience):
                    async with http.stream("POST", path, json=body) as answer:
                        text = (await answer.aread()).decode()
            except TimeoutError:
                left += 1
                return
        assert answer.status_code == 200, text
        if body["stream"]:
            events = text.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        else:
            chunks = [json.loads(text)]
        ends = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert sorted(ends) == list(range(body["n"]))
        whole += 1

    async def load(requests: int) -> None:
        limit = asyncio.Semaphore(32)
        connections = httpx.Limits(max_connections=64, max_keepalive_connections=32)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=connections) as http:
            await asyncio.gather(*(one(http, limit) for _ in range(requests)))

    def memory() -> list[int]:
        return [process.memory_info().rss for process in (served.gateway, served.engine)]

    asyncio.run(load(200))
    served.wait_quiet()
    grown_up = memory()
    asyncio.run(load(300))
    after = served.wait_quiet()
    for name, was, now in zip(("gateway", "engine"), grown_up, memory(), strict=True):
        # What a step needs comes and goes with its shape: up to 50 MiB. The soak watches for slow growth.
        assert now - was < 64 << 20, f"the {name} grew by {(now - was) / 2**20:.1f} MiB in 300 requests"
    assert whole + left == 500
    assert whole > 150
    assert left > 50
    ended = sum(after[name] - before[name] for name in after if name.startswith("ended:"))
    assert whole <= ended <= 1000, (whole, left, ended)
    assert after["ended:error"] == before["ended:error"]


DOES_NOTHING = (
    "import asyncio, numpy\nasync def main():\n    while True: await asyncio.sleep(0.3)\nasyncio.run(main())"
)
"""A process that wakes as often as an idle gateway does."""


def test_idling_costs_under_one_percent_of_a_core(served: Served) -> None:
    served.wait_quiet()
    control = psutil.Popen([sys.executable, "-c", DOES_NOTHING])
    try:
        time.sleep(2.0)  # until it has begun
        processes = {"gateway": served.gateway, "engine": served.engine, "control": control}

        def measured() -> dict[str, tuple[int, float]]:
            return {
                name: (process.num_ctx_switches().voluntary, sum(process.cpu_times()[:2]))
                for name, process in processes.items()
            }

        before, seconds = measured(), 5.0
        time.sleep(seconds)
        after = measured()
    finally:
        control.kill()
        control.wait()
    used = {name: (after[name][1] - before[name][1]) / seconds for name in processes}
    for name in ("gateway", "engine"):
        woken = (after[name][0] - before[name][0]) / seconds
        assert woken < 20, f"the idle {name} woke {woken:.0f} times a second"
    if (
        used["control"] > 0.002
    ):  # some virtual machines take an idle process's memory away, and it pays for that
        pytest.skip(f"this machine takes {used['control']:.1%} of a core for a process that only wakes")
    for name in ("gateway", "engine"):
        assert used[name] < 0.01, f"the idle {name} used {used[name]:.1%} of a core"


def test_a_killed_engine_is_an_error_in_the_stream_and_the_server_recovers(
    served: Served, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model="smol", prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    engine = served.engine
    engine.kill()
    with pytest.raises(openai.APIError, match="send it again"):
        for _ in stream:
            pass
    assert httpx.get(f"{served.url}/health").status_code == 503
    served.wait_line("engine: the engine was lost with SIGKILL")
    deadline = time.monotonic() + 60
    while httpx.get(f"{served.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "the server did not recover"
        time.sleep(0.1)
    assert served.engine.pid != engine.pid
    answer = client.chat.completions.create(model="smol", messages=CAPITAL, temperature=0, max_tokens=10)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_too_little_memory_is_one_line(smollm2_dir: Path) -> None:
    server = Served(smollm2_dir, "--kv-cache-memory", "9000GiB")
    server.launch()
    assert "are available" in server.wait_line("headrace: error: ")
    assert len(server.lines) == 1
    assert server.process.wait(10) == 1
    server._reader.join(5)


def test_sigterm_lets_what_runs_finish(served: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as running:
        lines = running.iter_lines()
        next(lines)
        served.signal(signal.SIGTERM)
        served.wait_line("draining: 1 running")
        assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 503
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-4]
    assert served.wait_end() == 0
    assert served.rest()[-1] == "stopped"  # and nothing of leaks after it
