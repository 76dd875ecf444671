"""Typed messages over a connection: length-prefixed msgpack frames of one tagged union.

In: `msgspec.Struct`s to send. Out: the structs the peer sent, checked field by field; whatever is not one of
the expected types is refused. It must not know what the messages mean. Nothing here can run code that the
peer chose (no pickle).

A frame is a 4-byte big-endian length and that many bytes of msgpack. After a frame that cannot be read there
is no way back to the next one, so the connection is aborted.
"""

from __future__ import annotations

import asyncio
from types import UnionType
from typing import Any, Generic, TypeVar

import msgspec

from headrace.world import Connection

Received = TypeVar("Received")

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Default limit on one frame's body, sent or received."""

_PREFIX_BYTES = 4


class ProtocolError(Exception):
    """The peer sent what this channel cannot accept, or was to be sent what it could not accept."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"channel with {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class Channel(Generic[Received]):
    """One connection's messages, in order, both ways.

    One task receives at a time; any number may send. Cancelling `receive` loses nothing.

        channel: Channel[Hello | Token] = Channel(connection, receives=Hello | Token)
    """

    def __init__(
        self,
        connection: Connection,
        receives: type[Received] | UnionType,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """`receives`: a Struct type or a union of tagged ones, all that the peer may send.

        `max_frame_bytes` bounds a frame's body both ways; the two sides should agree on it.
        """
        if not 0 < max_frame_bytes < 1 << 8 * _PREFIX_BYTES:
            raise ValueError(f"max_frame_bytes is {max_frame_bytes}: the length prefix holds 1 to 2^32 - 1")
        self._connection = connection
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._max_frame_bytes = max_frame_bytes
        self._body_bytes: int | None = None  # of the frame whose length has been read and whose body has not

    @property
    def peer(self) -> str:
        """The other side's address, for messages to people."""
        return self._connection.peer

    @property
    def is_behind(self) -> bool:
        """Whether the peer reads too slowly: what can be said later, or never, should not be said now."""
        return self._connection.is_behind

    def post(self, message: msgspec.Struct) -> None:
        """Queue a message and return at once.

        Raises ProtocolError, with nothing sent, when it is too long for a frame; ConnectionLost.
        """
        frame = bytearray(_PREFIX_BYTES)
        self._encoder.encode_into(message, frame, _PREFIX_BYTES)
        body_bytes = len(frame) - _PREFIX_BYTES
        if body_bytes > self._max_frame_bytes:
            limit = self._max_frame_bytes
            reason = f"a {type(message).__name__} of {body_bytes} bytes is not sent, the limit is {limit}"
            raise ProtocolError(self.peer, reason)
        frame[:_PREFIX_BYTES] = body_bytes.to_bytes(_PREFIX_BYTES, "big")
        self._connection.write(frame)

    async def send(self, message: msgspec.Struct) -> None:
        """Queue a message and wait until the queue is short again. Raises as `post`."""
        self.post(message)
        await self._connection.drain()

    async def receive(self) -> Received | None:
        """The peer's next message; None when its stream ended between two messages.

        Raises ProtocolError, with the connection aborted, for a frame that is too long, cut off by the end of
        the stream, or none of the expected messages; ConnectionLost.
        """
        try:
            if self._body_bytes is None:
                prefix = self._connection.take(_PREFIX_BYTES)
                if prefix is None:
                    prefix = await self._connection.read_exactly(_PREFIX_BYTES)
                self._body_bytes = int.from_bytes(prefix, "big")
            if self._body_bytes > self._max_frame_bytes:
                raise self._abandon(
                    f"a frame of {self._body_bytes} bytes, the limit is {self._max_frame_bytes}"
                )
            body = self._connection.take(self._body_bytes)
            if body is None:
                body = await self._connection.read_exactly(self._body_bytes)
        except asyncio.IncompleteReadError as error:
            if self._body_bytes is None and not error.partial:
                return None
            part = "length" if self._body_bytes is None else "body"
            reason = (
                f"the stream ended after {len(error.partial)} of {error.expected} bytes of a frame's {part}"
            )
            raise self._abandon(reason) from None
        self._body_bytes = None
        try:
            message: Received = self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._abandon(f"a frame of {len(body)} bytes is no expected message: {error}") from error
        return message

    def _abandon(self, reason: str) -> ProtocolError:
        self._body_bytes = None
        self._connection.abort()
        return ProtocolError(self.peer, reason)

    async def close(self) -> None:
        """Send what is queued and end the channel; see `Connection.close`."""
        await self._connection.close()

    def abort(self) -> None:
        """Drop the channel at once; see `Connection.abort`."""
        self._connection.abort()
