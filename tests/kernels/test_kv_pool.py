"""The KV pool in memory that is given: block-major, and a page's bytes mean the same in another pool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels import AttentionSpec, Kernels, KVCacheLayer
from headrace.kernels.batch import Batch
from headrace.kernels.native import NativeKernels
from headrace.kernels.reference import TorchKernels

KV_HEADS, HEAD_DIM, BLOCK, LAYERS, PAGES = 2, 24, 6, 3, 8
SPEC = AttentionSpec(4, KV_HEADS, HEAD_DIM, 0.2, None, None)
POSITIONS = 10

CASES = [
    pytest.param(kind(dtype=dtype), id=f"{name}-{dtype}".replace("torch.", ""))
    for name, kind in (("native", NativeKernels), ("reference", TorchKernels))
    for dtype in (torch.float32, torch.bfloat16)
]


class Pool:
    """A pool of `PAGES` in memory of a caller's own, and its layers."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.page_bytes = kernels.allocate_kv(1, LAYERS, KV_HEADS, HEAD_DIM, BLOCK).nbytes
        self.memory = torch.zeros(PAGES * self.page_bytes, dtype=torch.uint8)
        self.pages = kernels.allocate_kv(PAGES, LAYERS, KV_HEADS, HEAD_DIM, BLOCK, self.memory)
        self.caches = [KVCacheLayer(self.pages, 0, n, KV_HEADS, HEAD_DIM, BLOCK) for n in range(LAYERS)]

    def bytes_of(self, page: int) -> Tensor:
        return self.memory[page * self.page_bytes : (page + 1) * self.page_bytes]

    def run(self, table: list[int]) -> Tensor:
        """Write `POSITIONS` positions into the pages of `table`; what attention then gives at each layer."""
        generator = torch.Generator().manual_seed(5)
        outputs = []
        for cache in self.caches:
            qkv = torch.randn(POSITIONS, 8 * HEAD_DIM, generator=generator).to(self.kernels.dtype)
            batch = _batch(0, POSITIONS, table)
            cos_sin = torch.cat((torch.ones(64, HEAD_DIM // 2), torch.zeros(64, HEAD_DIM // 2)), 1)
            self.kernels.rotate_and_store(qkv, batch, cache, SPEC, cos_sin, None, None, 1e-6)
            outputs.append(self.attend(cache, table))
        return torch.stack(outputs)

    def attend(self, cache: KVCacheLayer, table: list[int]) -> Tensor:
        """Of one query at the last position, over all that the pages of `table` hold."""
        q = torch.linspace(-1, 1, 4 * HEAD_DIM).view(1, -1).to(self.kernels.dtype)
        return self.kernels.attention(q, _batch(POSITIONS - 1, POSITIONS, table), cache, SPEC)[0]


def _batch(start: int, end: int, table: list[int]) -> Batch:
    return Batch(
        torch.zeros(end - start, dtype=torch.int32),
        torch.arange(start, end, dtype=torch.int32),
        torch.tensor([0, end - start], dtype=torch.int32),
        torch.tensor([end], dtype=torch.int32),
        (torch.tensor([table], dtype=torch.int32),),
    )


@pytest.mark.parametrize("kernels", CASES)
def test_all_layers_of_a_page_lie_in_its_bytes_and_in_no_others(kernels: Kernels) -> None:
    pool = Pool(kernels)
    assert pool.pages.data_ptr() == pool.memory.data_ptr() and pool.pages.nbytes == pool.memory.nbytes
    pool.run([5, 2])
    touched = {page for page in range(PAGES) if pool.bytes_of(page).any()}
    assert touched == {5, 2}


@pytest.mark.parametrize("kernels", CASES)
def test_pages_copied_byte_by_byte_serve_in_another_pool(kernels: Kernels) -> None:
    here, there = Pool(kernels), Pool(kernels)
    expected = here.run([5, 2])
    there.bytes_of(0).copy_(here.bytes_of(5))
    there.bytes_of(7).copy_(here.bytes_of(2))
    got = torch.stack([there.attend(cache, [0, 7]) for cache in there.caches])
    assert torch.equal(got, expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("kernels", CASES)
def test_memory_of_another_size_or_place_is_refused(kernels: Kernels) -> None:
    size = Pool(kernels).page_bytes
    larger = torch.zeros(size + 64, dtype=torch.uint8)
    for memory in (larger, larger[: size - 1], larger[8 : size + 8]):
        with pytest.raises(ValueError, match=f"{memory.nbytes} bytes .*; {size} are needed"):
            kernels.allocate_kv(1, LAYERS, KV_HEADS, HEAD_DIM, BLOCK, memory)
