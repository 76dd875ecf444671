"""The native kernels against the machine's limits and against torch, in one run.

    python benchmarks/kernels.py [--threads 2] [--repeats 20]

Linear layers have the shapes of SmolLM2-135M. "share" is the rate at which weights (or keys and values) are
read over the rate at which this machine reads memory, measured just before; those of many layers are cycled
through, as in a model, so that no cache holds them. Ratios are torch's time over ours: above 1 we are faster.
Times are the least of the repeats: whatever else the machine does only adds to them.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels import AttentionSpec, KVCacheLayer
from headrace.kernels.batch import Batch
from headrace.kernels.native import NativeKernels
from machine import READ_BYTES, read_bandwidth, seconds

BF16 = torch.bfloat16
LINEAR_SHAPES = {
    "qkv": (576, 960),
    "o": (576, 576),
    "gate-up": (576, 3072),
    "down": (1536, 576),
    "head": (576, 49152),
}
ATTENTION_SHAPES = [(1, 1, 512), (1, 1, 4096), (32, 1, 512), (8, 1, 4096), (1, 512, 512), (1, 512, 4096)]
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
CYCLED_BYTES = READ_BYTES
MOST_FLOP = 2e11  # of one repeat


def measure_linear(kernels: NativeKernels, bandwidth: float, repeats: int) -> None:
    print(f"{'linear':20} {'µs':>8} {'GB/s':>6} {'share':>6} {'GFLOP/s':>8} {'vs F.linear':>12}")
    for name, (inputs, outputs) in LINEAR_SHAPES.items():
        weight = torch.randn(outputs, inputs).to(BF16)
        size = weight.numel() * weight.itemsize
        copies = max(2, CYCLED_BYTES // size)
        ours = [kernels.pack_linear(weight, None) for _ in range(copies)]
        theirs = [weight.clone() for _ in range(copies)]
        for rows in (1, 8, 32, 512):
            x = torch.randn(rows, inputs).to(BF16)
            flop = 2 * rows * weight.numel()
            used = max(2, min(copies, int(MOST_FLOP / flop)))
            took = seconds([partial(kernels.linear, x, packed) for packed in ours[:used]], repeats)
            torch_took = seconds([partial(F.linear, x, w) for w in theirs[:used]], max(2, repeats // 4))
            _report(f"{name}, {rows} rows", took, size, flop, bandwidth, torch_took)


def measure_attention(kernels: NativeKernels, bandwidth: float, repeats: int) -> None:
    print(f"\n{'attention':20} {'µs':>8} {'GB/s':>6} {'share':>6} {'GFLOP/s':>8} {'vs SDPA':>12}")
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, None, None)
    for sequences, queries, context in ATTENTION_SHAPES:
        size = sequences * context * 2 * KV_HEADS * HEAD_DIM * BF16.itemsize
        layers = max(1, min(30, CYCLED_BYTES // size))
        blocks = context // BLOCK_SIZE
        pages = kernels.allocate_kv(sequences * blocks, layers, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        pages.normal_()
        first = context - queries
        batch = Batch(
            token_ids=torch.zeros(sequences * queries, dtype=torch.int32),
            positions=torch.arange(first, context, dtype=torch.int32).repeat(sequences),
            query_start=torch.arange(sequences + 1, dtype=torch.int32) * queries,
            context=torch.full((sequences,), context, dtype=torch.int32),
            tables=(torch.randperm(sequences * blocks).int().view(sequences, blocks),),
        )
        q = torch.randn(sequences * queries, HEADS * HEAD_DIM).to(BF16)
        caches = [KVCacheLayer(pages, 0, layer, KV_HEADS, HEAD_DIM, BLOCK_SIZE) for layer in range(layers)]
        took = seconds([partial(kernels.attention, q, batch, cache, spec) for cache in caches], repeats)

        k, v = (torch.randn(layers, sequences, KV_HEADS, context, HEAD_DIM).to(BF16) for _ in "kv")
        heads = q.view(sequences, queries, HEADS, HEAD_DIM).transpose(1, 2)
        mask = torch.ones(queries, context, dtype=torch.bool).tril(first) if queries > 1 else None
        torch_took = seconds(
            [partial(_sdpa, heads, k[layer], v[layer], mask) for layer in range(layers)], max(2, repeats // 4)
        )
        seen = sequences * sum(range(first + 1, context + 1))
        flop = 4 * seen * HEADS * HEAD_DIM
        _report(f"{sequences} x {queries} at {context}", took, size, flop, bandwidth, torch_took)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def _report(name: str, took: float, size: int, flop: int, bandwidth: float, torch_took: float) -> None:
    rate = size / took
    print(
        f"{name:20} {took * 1e6:8.1f} {rate / 1e9:6.1f} {rate / bandwidth:6.0%} {flop / took / 1e9:8.0f} "
        f"{torch_took / took:11.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    kernels = NativeKernels(dtype=BF16, threads=options.threads)
    torch.set_num_threads(options.threads)
    bandwidth = read_bandwidth(options.repeats)
    print(f"{kernels.isa}, {options.threads} threads, memory read at {bandwidth / 1e9:.1f} GB/s\n")
    measure_linear(kernels, bandwidth, options.repeats)
    measure_attention(kernels, bandwidth, options.repeats)


if __name__ == "__main__":
    main()
