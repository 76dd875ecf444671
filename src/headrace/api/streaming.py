"""Server-sent events: a generation to bytes on the wire, with little work per token.

In: a generation and the route's way of writing a chunk. Out: one write per wake-up, however many choices went
on. The constant parts of a chunk are serialised once per choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.api.errors import FAILED, ApiError
from headrace.api.generation import ClientLeftError, Generation, Watcher
from headrace.api.sample import Piece, Sample

DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499
"""The status in our own log of an answer that nobody waited for."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ChunkWriter(ABC):
    """How a route writes the chunks of its stream."""

    @abstractmethod
    def begin(self, generation: Generation) -> bytes:
        """Chunks that come before the first text."""

    @abstractmethod
    def piece(self, choice: int, piece: Piece, sample: Sample) -> bytes:
        """The chunk for what was added to a choice; with its finish reason when that is set."""

    @abstractmethod
    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk for clients that ask for the usage."""


def event(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class ChunkTemplate:
    """A chunk of one choice in which only a text changes: everything around it is serialised once."""

    __slots__ = ("_after", "_before")

    _MARK = "\x00text\x00"

    def __init__(self, payload: Callable[[str], dict[str, Any]]) -> None:
        """`payload` makes the chunk around a text."""
        self._before, self._after = event(payload(self._MARK)).split(orjson.dumps(self._MARK))

    def fill(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._after


async def stream_response(
    receive: Receive, generation: Generation, writer: ChunkWriter, include_usage: bool
) -> Response:
    """The answer to a streaming request.

    It waits for the first output, so that what goes wrong until then is answered with its own status; an
    error after that is an event in the stream. Takes the generation over: it is closed when the stream ends.
    """
    watcher = Watcher(receive, generation)
    try:
        first = await anext(generation)
    except ClientLeftError:
        watcher.stop()
        generation.close()
        return Response(status_code=CLIENT_LEFT)
    except BaseException:
        watcher.stop()
        generation.close()
        raise
    return _EventStream(generation, watcher, writer, first, include_usage)


class _EventStream(Response):
    status_code = 200
    background = None

    def __init__(
        self,
        generation: Generation,
        watcher: Watcher,
        writer: ChunkWriter,
        first: list[tuple[int, Piece]],
        include_usage: bool,
    ) -> None:
        own = [(name.lower().encode(), value.encode("latin-1")) for name, value in generation.headers.items()]
        self.raw_headers = [*_HEADERS, *own]
        self._generation = generation
        self._watcher = watcher
        self._writer = writer
        self._first = first
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation, self._watcher:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._write(scope, send)
            self._watcher.stop()
            if last is not None:
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(self, scope: Scope, send: Send) -> bytes | None:
        """Send everything but the last bytes, which are returned; None when the client has left."""
        generation, writer = self._generation, self._writer
        samples = generation.samples
        unsent = writer.begin(generation)
        try:
            pieces = self._first
            while True:
                unsent += b"".join([writer.piece(choice, piece, samples[choice]) for choice, piece in pieces])
                if generation.is_over:
                    usage = writer.usage(generation.usage()) if self._include_usage else b""
                    return unsent + usage + DONE
                if unsent:
                    await send({"type": "http.response.body", "body": unsent, "more_body": True})
                    unsent = b""
                pieces = await anext(generation)
        except ApiError as error:
            scope.setdefault("state", {})[FAILED] = True
            return unsent + b"data: " + error.body() + b"\n\n" + DONE
        except ClientLeftError:
            return None
