"""Clients that leave: their requests are cancelled at once, and nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import pytest
from api_house import EOS, VOCAB_SIZE, ApiHouse
from house import EngineShape

STEP_S = 0.02


@pytest.fixture(scope="module")
def slow_house():  # type: ignore[no-untyped-def]
    shape = EngineShape(
        max_model_len=100_000,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({EOS}),
        num_blocks=30_000,
        step_s=STEP_S,
        max_num_seqs=16,
    )
    with ApiHouse(shape) as house:
        yield house


def post(house: ApiHouse, path: str, **body: object) -> socket.socket:
    """Send a request and leave the answer unread."""
    content = json.dumps({"max_tokens": 90_000, "ignore_eos": True, **body}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", house.port))
    connection.sendall(head.encode() + content)
    return connection


def steps_until_cancelled(house: ApiHouse, leave: object) -> int:
    """Steps that the engine still runs for a client that has left."""
    deadline = time.monotonic() + 5
    while not house.engine.scheduler.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(3 * STEP_S)
    before = house.engine.scheduler._steps
    leave()  # type: ignore[operator]
    house.assert_quiet()
    return house.engine.scheduler._steps - before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("reset", [False, True])
def test_leaving_cancels_within_a_step(slow_house: ApiHouse, path: str, stream: bool, reset: bool) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": ["a", "b"]}
    connection = post(slow_house, path, n=2, stream=stream, **body)
    if reset:
        import struct

        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # The step under way may end first, and one more may begin before the news has come through three hops.
    assert steps_until_cancelled(slow_house, connection.close) <= 2


def test_leaving_while_waiting_in_the_queue(slow_house: ApiHouse) -> None:
    connections = [post(slow_house, "/v1/completions", prompt="a", n=8, stream=i % 2 == 0) for i in range(4)]
    deadline = time.monotonic() + 5
    while slow_house.gateway.open_samples < 32:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for connection in reversed(connections):
        connection.close()
    slow_house.assert_quiet()


def test_a_client_that_does_not_read_holds_up_nobody(house: ApiHouse) -> None:
    """Its socket is full long before its answer ends; others are served, and the memory for it is bounded."""
    stuck = post(house, "/v1/completions", prompt="a", stream=True, max_tokens=400, n=60, logprobs=20)
    deadline = time.monotonic() + 40  # of 24,000 tokens with 20 alternatives each
    while house.gateway.open_samples == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with post(house, "/v1/completions", prompt="b", max_tokens=3) as other:
        other.settimeout(10)
        assert other.recv(100).startswith(b"HTTP/1.1 200")
    while house.gateway.open_samples:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    stuck.close()


def test_many_clients_that_come_and_go(house: ApiHouse) -> None:
    """200 requests with random patience; afterwards nothing is held and the counts agree."""
    endings = "headrace:request_success_total"

    def ended() -> float:
        lines = house.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(endings))

    before = house.do(ended)
    generator = random.Random(4)
    complete = 0

    async def client(number: int, limit: asyncio.Semaphore) -> None:
        nonlocal complete
        async with limit:
            stream = generator.random() < 0.7
            body = {
                "prompt": "x" * generator.randrange(1, 40),
                "max_tokens": generator.randrange(1, 40),
                "stream": stream,
                "stop": generator.choice([None, "w1", "w33"]),
            }
            content = json.dumps(body).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            patience = generator.choice([None, None, 0, 1, 1500, 3000])
            got = b""
            while patience is None or len(got) < patience:
                data = await reader.read(500)
                if not data:
                    complete += 1
                    assert b"[DONE]" in got or not stream
                    break
                got += data
            writer.close()

    async def main() -> None:
        limit = asyncio.Semaphore(32)
        async with asyncio.timeout(30):
            await asyncio.gather(*(client(number, limit) for number in range(200)))

    asyncio.run(main())
    house.assert_quiet()
    assert complete >= 60
    assert house.do(ended) - before <= 200  # a client may leave before its request is read
    assert house.do(ended) - before >= complete
