"""What the HTTP side is asked to be: its limits, who may call it, and how much of it each caller gets.

In: the command line and a file of keys. Out: small frozen objects. A key is kept as its SHA-256 from the
moment it is read, so that nothing further on can print it.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

DEFAULT_MAX_BODY_BYTES = 16 << 20
DEFAULT_MAX_PROMPT_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller: the digest of the key that it sends, and its limits, where None is no limit."""

    name: str
    """What logs and errors call it."""
    digest: bytes
    """SHA-256 of the key's UTF-8."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output together."""
    concurrent_requests: int | None = None
    operator: bool = False
    """Whether it may drain workers, and look into everybody's requests."""

    def __post_init__(self) -> None:
        for limit in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ValueError(f"{limit} of the key {self.name!r} must be at least 1, got {value}")

    @classmethod
    def of(cls, key: str, name: str, *, operator: bool = False) -> ApiKey:
        """A key without limits. Raises ValueError for what no header can carry."""
        if not key or any(character.isspace() for character in key):
            raise ValueError(f"the key {name!r} is empty or has spaces in it; no client could send it")
        return cls(name, hashlib.sha256(key.encode()).digest(), operator=operator)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """Limits of the HTTP side. Sizes in bytes, times in seconds."""

    keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    """Without keys everybody may call."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call from a browser; `*` is all of them, none is none."""
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    max_prompt_characters: int = DEFAULT_MAX_PROMPT_CHARACTERS
    """Of all texts of a request together, before they are tokenised."""
    request_timeout_s: float | None = None
    """The longest that a request may take, whatever its client asks for."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise ValueError(f"request_timeout_s must be above 0, got {self.request_timeout_s}")
        for what, values in (
            ("names", [key.name for key in self.keys]),
            ("keys", [key.digest for key in self.keys]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"two API keys have the same {what[:-1]}; each needs its own")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    key: str | None = None
    sha256: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    operator: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_Entry]


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a TOML file with a table `[[keys]]` each. Raises OSError, ValueError with what is wrong."""
    try:
        entries = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File).keys
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path} is not a file of API keys: {error}") from None
    if not entries:
        raise ValueError(f"{path} has no [[keys]]; without any, nobody could call")
    return tuple(_key_of(entry, path) for entry in entries)


def _key_of(entry: _Entry, path: Path) -> ApiKey:
    if (entry.key is None) == (entry.sha256 is None):
        raise ValueError(f"{path}: the key {entry.name!r} needs either `key` or `sha256`")
    if entry.key is not None:
        digest = ApiKey.of(entry.key, entry.name).digest
    else:
        try:
            digest = bytes.fromhex(entry.sha256 or "")
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ValueError(f"{path}: the sha256 of the key {entry.name!r} is not 64 hexadecimal digits")
    return ApiKey(
        entry.name,
        digest,
        entry.requests_per_minute,
        entry.tokens_per_minute,
        entry.concurrent_requests,
        entry.operator,
    )
