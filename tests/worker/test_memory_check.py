"""What is said when engines cannot all have the memory that they are asked to take."""

from __future__ import annotations

import pytest

from headrace.config import EngineOptions
from headrace.worker.memory import check_memory

MIB = 1 << 20


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        (4, "each of 4 workers needs 100 MiB .*; start 3, which would fit, lower it, or free memory"),
        (10**30, "start 3, which would fit"),
        (1, None),
        (3, None),
    ],
)
def test_it_says_how_many_would_fit(engines: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.worker.memory.available_memory", lambda: 500 * MIB)
    options = EngineOptions(directory="", served_name="", dtype="float32", kv_cache_memory=50 * MIB)
    shapes = [(25 * MIB,)]  # of four bytes each
    if said is None:
        check_memory(shapes, options, engines)
    else:
        with pytest.raises(MemoryError, match=said):
            check_memory(shapes, options, engines)


def test_where_not_even_one_fits_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.worker.memory.available_memory", lambda: 50 * MIB)
    options = EngineOptions(directory="", served_name="", dtype="float32", kv_cache_memory=50 * MIB)
    with pytest.raises(MemoryError, match=r"are available; lower it, or free memory"):
        check_memory([(25 * MIB,)], options, 2)
