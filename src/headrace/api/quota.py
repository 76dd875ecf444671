"""Who calls, and whether that caller may have more: keys to callers, and a budget for each.

In: an Authorization header, later a request's tokens. Out: a caller, admission or a 429 with the time after
which another attempt can succeed. Budgets are token buckets that hold one minute's worth and fill evenly, so
a caller may burst and is held to its rate over any longer time. It must not know HTTP beyond the header.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Sequence

from headrace.api.errors import ApiError
from headrace.config import ApiKey

SCHEME = b"bearer"
_MINUTE_S = 60.0


class Bucket:
    """What is left of a rate. May go below 0: what was taken then has to fill up before more is given."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until `amount` (at most a minute's worth) can be taken; 0 is now."""
        self._fill(now)
        return max(0.0, (amount - self._level) * _MINUTE_S / self.per_minute)

    def take(self, amount: int, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE_S)
        self._at = now


class Caller:
    """One key's use of the server."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self.name = key.name
        self.operator = key.operator
        self._clock = clock
        now = clock()
        self._requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, now)
        self._tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, now)
        self._most_at_once = key.concurrent_requests
        self.running = 0

    def begin(self) -> None:
        """Count a request that is going to generate, before its texts are looked at. Raises ApiError 429."""
        self._check_running()
        self.admit_small()

    def admit(self, prompt_tokens: int) -> Admission:
        """Let a generation in that has begun, its prompts' tokens counted; close the admission when it has
        ended.

        Raises ApiError: 429 for what a later attempt may get, 400 for a prompt above a minute's tokens.
        """
        now = self._clock()
        if self._tokens is not None:
            most = self._tokens.per_minute
            if prompt_tokens > most:
                raise ApiError(
                    400,
                    f"the request has {prompt_tokens} prompt tokens, and the key {self.name!r} may use "
                    f"{most} tokens per minute; send a shorter prompt",
                    code="rate_limit_exceeded",
                )
            self._demand(self._tokens, max(1, prompt_tokens), "tokens", now)
        self._check_running()
        if self._tokens is not None:
            self._tokens.take(prompt_tokens, now)
        self.running += 1
        return Admission(self)

    def admit_small(self) -> None:
        """Let in a request that generates nothing: it counts against requests per minute alone."""
        if self._requests is not None:
            now = self._clock()
            self._demand(self._requests, 1, "requests", now)
            self._requests.take(1, now)

    def leave(self, output_tokens: int) -> None:
        self.running -= 1
        if self._tokens is not None:
            self._tokens.take(output_tokens, self._clock())

    def _check_running(self) -> None:
        if self._most_at_once is not None and self.running >= self._most_at_once:
            raise ApiError(
                429,
                f"the key {self.name!r} may run {self._most_at_once} requests at once; wait for one to end",
                code="rate_limit_exceeded",
            )

    def _demand(self, bucket: Bucket, amount: int, unit: str, now: float) -> None:
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            retry_after_s = math.ceil(wait_s)
            raise ApiError(
                429,
                f"the key {self.name!r} may use {bucket.per_minute} {unit} per minute and has used them up; "
                f"try again in {retry_after_s} s",
                code="rate_limit_exceeded",
                retry_after_s=retry_after_s,
            )


class Admission:
    """One request's place in its caller's budget, until it is closed. Without a caller it costs nothing."""

    def __init__(self, caller: Caller | None) -> None:
        self._caller = caller

    def close(self, output_tokens: int) -> None:
        """Give the place back and charge what was generated. Idempotent."""
        if self._caller is not None:
            self._caller.leave(output_tokens)
            self._caller = None


class KeyRing:
    """Finds the caller of a request."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float]) -> None:
        self._callers = {key.digest: Caller(key, clock) for key in keys}

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller_of(self, authorization: bytes) -> Caller:
        """Raises ApiError 401 without a header, or with a key that is not known.

        Every digest is compared, in constant time, so how long it takes says nothing about the keys.
        """
        if not authorization:
            raise ApiError(
                401, "no API key: send the header 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key).digest()
        found = None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None or scheme.lower() != SCHEME:
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
        return found
