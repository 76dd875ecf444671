"""On what terms a request runs: for whom, and until when.

In: what the doors before the routes found out, the body's `timeout`, a header, the server's own limit. Out:
one small object that a generation keeps to.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from fastapi import Request

from headrace.api.access import caller_of
from headrace.api.errors import ApiError
from headrace.api.quota import Admission, Caller
from headrace.api.request_ids import new_request_id, request_id_of
from headrace.api.schema import MAX_TIMEOUT_S
from headrace.api.served import Server

TIMEOUT_HEADER = "X-Request-Timeout"
SESSION_HEADER = "X-Session-ID"


@dataclass(frozen=True, slots=True)
class Terms:
    caller: Caller | None = None
    timeout_s: float | None = None
    session: str = ""
    """Requests of one session are better served by one worker."""
    began_s: float = 0.0
    """When the request's body was there, in the event loop's time; the timeout runs from here."""
    request_id: str = field(default_factory=new_request_id)
    """What its answer names, and `headrace explain` takes."""

    @classmethod
    def of(cls, server: Server, request: Request, timeout_s: float | None) -> Terms:
        """The shortest of the timeouts counts. Counts the request against its caller's.

        Raises ApiError: 400 for a header that is no number of seconds, 429 where the caller may not begin.
        """
        asked = [timeout_s, _from_header(request), server.options.request_timeout_s]
        given = [seconds for seconds in asked if seconds is not None]
        if (caller := caller_of(request.scope)) is not None:
            caller.begin()
        session = request.headers.get(SESSION_HEADER, "")
        began_s = asyncio.get_running_loop().time()
        return cls(caller, min(given, default=None), session, began_s, request_id_of(request.scope))

    @property
    def tenant(self) -> str:
        """Whose turn it is, among requests of equal urgency."""
        return "" if self.caller is None else self.caller.name

    def admit(self, prompt_tokens: int) -> Admission:
        """Raises ApiError 429 where the caller may have no more now."""
        return Admission(None) if self.caller is None else self.caller.admit(prompt_tokens)

    def expired(self) -> ApiError:
        """What the client is told when its time is up."""
        return ApiError(
            408,
            f"the request did not end within its timeout of {self.timeout_s:g} s and was cancelled; "
            "allow more time, or ask for fewer tokens",
            param="timeout",
            code="deadline_exceeded",
        )


def admit_small(request: Request) -> None:
    """Count a request that generates nothing. Raises ApiError 429."""
    if (caller := caller_of(request.scope)) is not None:
        caller.admit_small()


def _from_header(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ApiError(
            400,
            f"{TIMEOUT_HEADER} must be a number of seconds above 0 and at most {MAX_TIMEOUT_S}, "
            f"got {text[:40]!r}",
            param=TIMEOUT_HEADER,
        )
    return seconds
