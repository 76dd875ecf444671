"""Reading memory, which calibrations take the rate of memory from."""

from __future__ import annotations

import importlib.util
import time

import pytest

from headrace.kernels.memory import memory_reader

SIZE = 8 << 20


@pytest.mark.parametrize("native", [True, False])
def test_all_of_it_is_read_each_time(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and importlib.util.find_spec("headrace._native") is None:
        pytest.skip("the native kernels were not built")
    if not native:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    read = memory_reader(SIZE)

    def took(times: int) -> float:
        began = time.process_time()
        assert [read() for _ in range(times)] == [SIZE] * times
        return time.process_time() - began

    assert took(20) / 20 > SIZE / 1e12  # no core reads a terabyte a second: something is read
