"""A small HTTP server whose every answer is a script: known delays, known bytes, known faults."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    connection: int
    at: float

    @property
    def body(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.content)
        return parsed


class Reply:
    """What a script answers with. `left` is set when the client has gone."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.keep = True

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def whole(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.raw(b"HTTP/1.1 %d X\r\ncontent-type: %b\r\n" % (status, kind.encode()))
        self.raw(b"content-length: %d\r\n\r\n" % len(body) + body)

    def json(self, status: int, value: object) -> None:
        self.whole(status, json.dumps(value).encode())

    def begin(self, kind: str = "text/event-stream") -> None:
        self.raw(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kind.encode())
        self.raw(b"transfer-encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.raw(b"%x\r\n" % len(data) + data + b"\r\n")

    def event(self, *values: object) -> None:
        """Events that arrive together."""
        self.chunk(b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values))

    def end(self) -> None:
        self.chunk(b"data: [DONE]\n\n")
        self.raw(b"0\r\n\r\n")

    def hang_up(self) -> None:
        self.keep = False
        self.writer.close()


def token(text: str = "x", **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **more}]}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


Script = Callable[[Asked, Reply], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Answers /v1/models itself and everything else by `script`."""

    script: Script
    model: str = "scripted"
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked.body for asked in self.asked if asked.method == "POST"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        reply = Reply(writer)
        try:
            while reply.keep:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split()
                headers = {
                    name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)
                }
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                at = asyncio.get_running_loop().time()
                asked = Asked(method, path, headers, content, number, at)
                self.asked.append(asked)
                if path.endswith("/models") and method == "GET" and self.model:
                    reply.json(200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
                    continue
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    await self.script(asked, reply)
                finally:
                    self.open -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(script: Script, **options: Any) -> Any:
    """A scripted server on this loop."""
    server = ScriptedServer(script, **options)
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await server.serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            tasks.discard(task)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def serving_beside(script: Script, **options: Any) -> Iterator[ScriptedServer]:
    """A scripted server on a thread of its own, for commands that have a loop of theirs."""
    started: list[ScriptedServer] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving(script, **options) as server:
            started.append(server)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(10), "the scripted server did not start within 10 s"
    try:
        yield started[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()


def completion(
    *, tokens: int | None = None, first_s: float = 0.0, gap_s: float = 0.0, per_chunk: int = 1
) -> Script:
    """A good server: `tokens` (or max_tokens) after `first_s`, then `per_chunk` of them every `gap_s`."""

    async def script(asked: Asked, reply: Reply) -> None:
        body = asked.body
        count = body.get("max_tokens", 16) if tokens is None else tokens
        chat = asked.path.endswith("/chat/completions")
        prompt = body.get("prompt")
        prompt_tokens = len(prompt) if prompt is not None else len(str(body["messages"]).split())
        reply.begin()
        if chat:
            reply.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(first_s)
        sent = 0
        while sent < count:
            if sent:
                await asyncio.sleep(gap_s)
            now = min(per_chunk, count - sent)
            sent += now
            text = "x" * now
            finish = "length" if sent == count else None
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = [1000 + sent - now + i for i in range(now)]
            reply.event({"choices": [choice]})
        if body.get("stream_options", {}).get("include_usage"):
            reply.event(usage(prompt_tokens, count))
        reply.end()
        await reply.writer.drain()

    return script
