"""The HTTP client against scripted answers, faults included."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from scripted_server import Asked, Reply, serving

from headrace.bench.errors import BenchError, FailureKind, RequestFailed
from headrace.bench.http import Answer, HttpClient, Origin


def ask(script, times: int = 1, between_s: float = 0.0):  # type: ignore[no-untyped-def]
    """Answers to `times` posts one after another, and the server."""

    async def main():  # type: ignore[no-untyped-def]
        async with serving(script) as server:
            client = HttpClient(Origin.parse(server.url))
            answers = []
            for number in range(times):
                if number:
                    await asyncio.sleep(between_s)
                answer = Answer()
                await asyncio.wait_for(client.post("/x", b'{"n":%d}' % number, answer), 5)
                answers.append(answer)
            client.close()
            return answers, server

    return asyncio.run(main())


def failure(script, times: int = 1) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestFailed) as caught:
        ask(script, times)
    return caught.value.failure.kind


def test_whole_chunked_and_unbounded_bodies_are_read() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        kind = asked.body["n"]
        if kind == 0:
            reply.whole(200, b"whole", "text/plain")
        elif kind == 1:
            reply.begin("text/plain")
            reply.chunk(b"chun")
            await reply.writer.drain()
            reply.chunk(b"ked")
            reply.raw(b"0\r\n\r\n")
        else:
            reply.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nto the end")
            reply.hang_up()

    answers, server = ask(script, 3)
    assert [bytes(answer.body) for answer in answers] == [b"whole", b"chunked", b"to the end"]
    assert server.connections == 1
    assert [asked.content for asked in server.asked] == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert server.asked[0].headers["host"] == f"127.0.0.1:{server.port}"


def test_an_announcement_before_the_answer_is_skipped() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        reply.raw(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        reply.whole(201, b"later")

    answers, _ = ask(script)
    assert answers[0].status == 201
    assert answers[0].body == b"later"


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        reply.whole(200, b"ok")
        if asked.connection == 1:
            reply.hang_up()

    answers, server = ask(script, 3, between_s=0.02)
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert server.connections == 2
    assert len(server.asked) == 3


def test_a_connection_lost_as_the_next_request_is_sent_is_replaced() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        if asked.connection == 1 and asked.body["n"] == 1:  # closed without a word, though it was kept
            reply.hang_up()
        else:
            reply.whole(200, b"ok")

    answers, server = ask(script, 2)
    assert [answer.status for answer in answers] == [200, 200]
    assert server.connections == 2


def test_connection_close_is_obeyed() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        reply.raw(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")

    _, server = ask(script, 2)
    assert server.connections == 2


def test_every_bad_ending_has_its_kind() -> None:
    async def silent(asked: Asked, reply: Reply) -> None:
        reply.hang_up()

    async def cut(asked: Asked, reply: Reply) -> None:
        reply.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        reply.hang_up()

    async def cut_chunk(asked: Asked, reply: Reply) -> None:
        reply.begin()
        reply.raw(b"ff\r\nhalf")
        reply.hang_up()

    async def cut_head(asked: Asked, reply: Reply) -> None:
        reply.raw(b"HTTP/1.1 200 OK\r\ncontent-le")
        reply.hang_up()

    async def other_protocol(asked: Asked, reply: Reply) -> None:
        reply.raw(b"SSH-2.0-OpenSSH_9.6\r\n")

    assert failure(silent) == FailureKind.DISCONNECTED
    assert failure(cut) == FailureKind.DISCONNECTED
    assert failure(cut_chunk) == FailureKind.DISCONNECTED
    assert failure(cut_head) == FailureKind.DISCONNECTED
    assert failure(other_protocol) == FailureKind.MALFORMED


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RequestFailed, match=r"cannot connect to http://127\.0\.0\.1") as caught:
            asyncio.run(HttpClient(Origin.parse(url)).get("/"))
    assert caught.value.failure.kind == FailureKind.CONNECT


def test_a_cancelled_request_closes_its_connection() -> None:
    left = []

    async def script(asked: Asked, reply: Reply) -> None:
        reply.begin()
        try:
            while True:
                reply.event({})
                await reply.writer.drain()
                await asyncio.sleep(0.001)
        except ConnectionError:
            left.append(time.perf_counter())
            raise

    async def main() -> None:
        async with serving(script) as server:
            client = HttpClient(Origin.parse(server.url))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.post("/x", b"{}", Answer())
            deadline = time.perf_counter() + 2
            while not left:
                assert time.perf_counter() < deadline, "the server did not see the client leave"
                await asyncio.sleep(0.005)

    asyncio.run(main())


def test_many_at_once_each_get_their_own_answer() -> None:
    async def script(asked: Asked, reply: Reply) -> None:
        await asyncio.sleep(0.001 * (asked.body["n"] % 7))
        reply.json(200, asked.body["n"])

    async def main() -> None:
        async with serving(script) as server:
            client = HttpClient(Origin.parse(server.url))

            async def one(number: int) -> bool:
                answer = Answer()
                await client.post("/x", b'{"n":%d}' % number, answer)
                return bytes(answer.body) == b"%d" % number

            assert all(await asyncio.gather(*(one(n) for n in range(50))))
            assert all(await asyncio.gather(*(one(n) for n in range(50))))
            assert server.connections <= 50
            client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "text", "port"),
    [
        ("http://h:80/v1/", "http://h/v1", 80),
        ("https://h", "https://h", 443),
        ("h:8000", "http://h:8000", 8000),
        ("http://[::1]:8000", "http://[::1]:8000", 8000),
    ],
)
def test_origins(url: str, text: str, port: int) -> None:
    origin = Origin.parse(url)
    assert (str(origin), origin.port) == (text, port)


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:99999", "http://u:p@h", "http://h?x=1", ""])
def test_what_is_no_origin_is_refused(url: str) -> None:
    with pytest.raises(BenchError):
        Origin.parse(url)


def test_a_header_cannot_be_smuggled() -> None:
    with pytest.raises(BenchError, match="authorization"):
        HttpClient(Origin.parse("h:1"), {"authorization": "Bearer x\r\nevil: 1"})
