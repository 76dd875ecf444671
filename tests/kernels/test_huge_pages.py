"""Memory that may be huge pages is the process's own: shared memory would need another setting for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.kernels.huge_pages import HUGE_PAGE_BYTES, huge_zeros

STATUS = Path("/proc/self/status")
SIZE = 32 << 20


def resident(field: str) -> int:
    """Bytes, by the kernel's own account."""
    return next(
        int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")
    )


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc to tell private memory from shared")
def test_it_is_zeros_taken_as_they_are_written_and_private() -> None:
    before, shared = resident("RssAnon"), resident("RssShmem")
    memory = huge_zeros(SIZE)
    assert memory.data_ptr() % HUGE_PAGE_BYTES == 0 and memory.shape == (SIZE,)
    assert resident("RssAnon") - before < SIZE // 2
    assert not memory.any()
    memory.fill_(1)
    assert resident("RssAnon") - before > SIZE // 2
    assert resident("RssShmem") - shared < SIZE // 2
