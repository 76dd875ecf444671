"""Server-sent events: bytes in as they come, the `data` of each whole event out.

Follows the event stream format of the HTML standard (https://html.spec.whatwg.org/multipage/server-sent-
events.html) in what matters here: comments and other fields are skipped, lines of `data` are joined, line
ends may be LF, CRLF or CR and may be cut anywhere.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 << 20


class EventParser:
    """One stream's events."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    @property
    def pending(self) -> int:
        """Bytes of an event that is not complete."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that `data` completes. Raises ValueError for an event without end."""
        buffer = self._rest + data if self._rest else data
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # perhaps the first half of a CRLF
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = buffer.split(b"\n\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        self._rest = rest + held
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(block[6:])
            elif (joined := _data(block)) is not None:
                events.append(joined)
        return events


def _data(block: bytes) -> bytes | None:
    """The `data` lines of one event, joined by LF; None where there is none."""
    lines = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None
