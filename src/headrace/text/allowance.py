"""What a template may spend, and what it has spent.

In: the values that a template makes and the work it asks for. Out: nothing, or a `SecurityError` once a limit
is passed. The unit is a character copied; everything else is priced in it. No clock is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from jinja2.exceptions import SecurityError

MAX_CHARACTERS: Final = 8_000_000
"""Largest string that a template may make, and largest output."""
MAX_PARTS: Final = 500_000
"""Most values that a list or mapping may hold, with everything inside it."""
MAX_WORK: Final = 250_000_000
"""Budget of one rendering, in characters copied."""
STEP_WORK: Final = 250
"""What any single operation costs besides."""
PART_WORK: Final = 200
"""What looking at one part of a list or mapping costs."""
MAX_INTEGER_BITS: Final = 256

_CONTAINERS: Final = (list, tuple, dict, set, frozenset)


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.left = MAX_WORK


_budget: ContextVar[Budget] = ContextVar("template budget")


@contextmanager
def budget() -> Iterator[None]:
    """One rendering's allowance; whatever the environment does inside is paid from it."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def pay(characters: int = 0) -> None:
    budget = _budget.get()
    budget.left -= STEP_WORK + characters
    if budget.left < 0:
        raise SecurityError(f"it does more than the work of copying {MAX_WORK} characters")


def size_of(value: Any) -> int:
    """Characters and parts of `value` with everything inside it. Shared parts count each time, as they would
    when written out. Raises `SecurityError` beyond the limits."""
    if type(value) is str or isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise SecurityError(f"it makes an integer of more than {MAX_INTEGER_BITS} bits")
        return 1
    if not isinstance(value, _CONTAINERS):
        return 1
    parts = size = 0
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, _CONTAINERS):
            waiting.extend(part)
            if isinstance(part, dict):
                waiting.extend(part.values())
        if parts + len(waiting) > MAX_PARTS:
            raise SecurityError(f"it makes a value of more than {MAX_PARTS} parts")
    pay(PART_WORK * parts)
    return parts + size


def checked(value: Any) -> Any:
    """Pay for a value that was just made, and give it back."""
    if (size := size_of(value)) > MAX_CHARACTERS:
        raise SecurityError(f"it makes a text of {size} characters, the limit is {MAX_CHARACTERS}")
    pay(size if type(value) is str else length_of(value))
    return value


def length_of(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, *_CONTAINERS)) else 1


def announce(characters: int) -> None:
    """Pay for a text before it is made."""
    if characters > MAX_CHARACTERS:
        raise SecurityError(f"it would make a text of {characters} characters, the limit is {MAX_CHARACTERS}")
    pay(characters)


def joined_lists(left: list[Any], right: list[Any]) -> list[Any]:
    """The two lists in one, for the price of its length."""
    length = len(left) + len(right)
    if length > MAX_PARTS:
        raise SecurityError(f"it makes a list of {length} values, the limit is {MAX_PARTS}")
    pay(length)
    return left + right
