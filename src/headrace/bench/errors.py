"""What can go wrong in a run, told apart: the user's request to the tool, and a request to the server."""

from __future__ import annotations

import enum

import msgspec


class BenchError(ValueError):
    """A run that cannot begin as asked; the text says what was wrong, where, the limit, and what to do."""


class FailureKind(enum.StrEnum):
    """Why a request did not end as it should. An HTTP status other than 200 is `http_429` and so on."""

    CONNECT = "connect"  # no connection came about
    DISCONNECTED = "disconnected"  # the connection ended before the answer did
    HTTP = "http"  # a status other than 200
    MALFORMED = "malformed"  # the answer is not HTTP, not an event stream, or not OpenAI's objects
    REFUSED = "refused"  # an error object where tokens were due
    EMPTY = "empty"  # the answer ended properly and had no token
    TIMEOUT = "timeout"  # not ended within the run's limit for a request
    CANCELLED = "cancelled"  # the run was stopped while it was under way


class Failure(msgspec.Struct, frozen=True):
    """How one request failed."""

    kind: str
    """A `FailureKind`, with the status behind it where that is what went wrong."""
    message: str


class RequestFailed(Exception):
    """A request ended in `failure`."""

    def __init__(self, kind: FailureKind, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.failure = Failure(kind if status is None else f"{kind}_{status}", message)
        self.status = status
