"""Every kernel in plain torch: the yardstick for the native ones, and what runs where those cannot be built.

Clarity before speed. Arithmetic is float32 throughout; `dtype` rounds where the interface says that it
does (weights, inputs and outputs of linear layers, cached keys and values).

A page is [layers, 2, block_size, kv_heads, head_dim], keys first.

Batch invariance rests on one rule: what computes a row has the same shape whatever else is in the call,
and the row's place in it follows from its own position or does not matter. Linear layers run in tiles
of 16 rows; norms and activations one row at a time (torch's vectorised functions round the last few
elements of a call differently); attention in tiles of 16 queries by 64 keys, both cut at multiples of
absolute positions.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.base import (
    Activation,
    AttentionSpec,
    Build,
    GatedLinear,
    Kernels,
    KVCacheLayer,
    Linear,
    Operations,
    Program,
    Quantization,
)
from headrace.kernels.batch import Batch
from headrace.kernels.huge_pages import pool_in
from headrace.kernels.int8 import TorchInt8Linear, multiply_int8, pack_int8

_Method = TypeVar("_Method", bound=Callable[..., Any])

_ROWS_PER_TILE = 16
_QUERIES_PER_TILE = 16
_KEYS_PER_TILE = 64
# Without batch invariance, large enough to be quick and small enough that scores stay a few megabytes.
_MAX_QUERIES = 256


@dataclass(frozen=True, slots=True)
class TorchLinear(Linear):
    """Values of `Kernels.dtype`, kept as float32: products of bfloat16 are exact there, sums unrounded."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class TorchGatedLinear(GatedLinear):
    """Gate and up as one layer of twice the width."""

    both: TorchLinear | TorchInt8Linear
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class TorchProgram(Program):
    """Nothing is recorded: the function runs each time."""

    build: Build
    operations: Operations

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        return self.build(self.operations, x, batch)


def _timed(method: _Method) -> _Method:
    """Count the method's time as kernel time."""

    @wraps(method)
    def timed(self: TorchKernels, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        result = method(self, *args, **kwargs)
        self._busy_s += perf_counter() - start
        return result

    return cast(_Method, timed)


class TorchKernels(Kernels):
    """The reference implementation, on the CPU.

    dtype:   float32 or bfloat16
    threads: of torch's pool, which is the process's; None leaves it as it is
    """

    name = "reference"

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quantization: Quantization = "none",
        batch_invariant: bool = False,
        threads: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; the reference kernels support torch.float32, torch.bfloat16")
        if threads is not None:
            torch.set_num_threads(threads)
        self.dtype = dtype
        self.quantization = quantization
        self.batch_invariant = batch_invariant
        self._busy_s = 0.0

    @property
    def numerics(self) -> str:
        # torch's libraries choose their loops by the processor, and split sums by the number of threads.
        capability = torch.backends.cpu.get_cpu_capability().lower()
        name = f"{self.name}-{_processor()}-{capability}-{torch.get_num_threads()}-threads"
        return name if self.quantization == "none" else f"{name}-{self.quantization}"

    @property
    def busy_s(self) -> float:
        return self._busy_s

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> TorchLinear | TorchInt8Linear:
        if self.quantization == "int8":
            return pack_int8(weight.to(self.dtype), bias)
        return TorchLinear(
            weight.to(self.dtype).to(torch.float32).contiguous(),
            None if bias is None else bias.to(torch.float32),
            weight.shape[1],
            weight.shape[0],
        )

    def capture(self, build: Build, x: Tensor) -> TorchProgram:
        return TorchProgram(build, self)

    @_timed
    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        return F.embedding(token_ids, table).to(torch.float32) * scale

    @_timed
    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        # torch's vectorised tanh rounds the last few elements of a call differently.
        return x.copy_(self._by_row(lambda rows: torch.tanh(rows / cap) * cap, x))

    @_timed
    def linear(
        self, x: Tensor, packed: Linear, *, out_dtype: torch.dtype | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        if isinstance(packed, TorchInt8Linear):
            result = multiply_int8(x, packed)
        else:
            assert isinstance(packed, TorchLinear)
            weight, bias = packed.weight, packed.bias
            result = self._in_tiles(lambda rows: F.linear(rows, weight, bias), x.to(torch.float32))
        if add_to is not None:
            return add_to.add_(result)
        return result.to(out_dtype or self.dtype)

    @_timed
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, add_to: Tensor | None = None) -> Tensor:
        result = self._by_row(lambda rows: _rms_norm(rows, weight, eps), x)
        return result.to(self.dtype) if add_to is None else add_to.add_(result)

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> TorchGatedLinear:
        return TorchGatedLinear(self.pack_linear(weight, bias), weight.shape[1], weight.shape[0] // 2)

    def gated_linear(self, x: Tensor, packed: GatedLinear, activation: Activation) -> Tensor:
        assert isinstance(packed, TorchGatedLinear)
        return self._gated(self.linear(x, packed.both), activation)

    @_timed
    def _gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        def gated(rows: Tensor) -> Tensor:
            gate, up = rows.chunk(2, dim=-1)
            act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
            return act * up

        return self._by_row(gated, gate_up.to(torch.float32)).to(self.dtype)

    def allocate_kv(
        self,
        pages: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        memory: Tensor | None = None,
    ) -> Tensor:
        shape = (pages, layers, 2, block_size, kv_heads, head_dim)
        return torch.zeros(shape, dtype=self.dtype) if memory is None else pool_in(memory, shape, self.dtype)

    @_timed
    def rotate_and_store(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: KVCacheLayer,
        spec: AttentionSpec,
        cos_sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        tokens = qkv.shape[0]
        heads = qkv.to(torch.float32).view(tokens, -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if q_norm is not None:
            weight = q_norm
            q = self._by_row(lambda rows: _rms_norm(rows, weight, eps), q)
        if k_norm is not None:
            weight_k = k_norm
            k = self._by_row(lambda rows: _rms_norm(rows, weight_k, eps), k)
        positions = batch.positions.long()
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        self._store(_rotate(k, cos, sin), v, batch, positions, cache)
        return _rotate(q, cos, sin).to(self.dtype).view(tokens, -1)

    def _store(self, k: Tensor, v: Tensor, batch: Batch, positions: Tensor, cache: KVCacheLayer) -> None:
        counts = batch.query_start.diff().long()
        sequences = torch.repeat_interleave(torch.arange(len(counts)), counts)
        pages = batch.tables[cache.group][sequences, positions // cache.block_size].long()
        slots = positions % cache.block_size
        cache.pages[pages, cache.layer, 0, slots] = k.to(self.dtype)
        cache.pages[pages, cache.layer, 1, slots] = v.to(self.dtype)

    @_timed
    def attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        tokens = q.shape[0]
        # [tokens, kv_heads, heads of a group, head_dim]
        queries = q.to(torch.float32).view(tokens, spec.kv_heads, -1, spec.head_dim)
        out = torch.empty_like(queries)
        lse = torch.empty(queries.shape[:-1])
        tile = _QUERIES_PER_TILE if self.batch_invariant else _MAX_QUERIES
        starts = batch.query_start.tolist()
        for sequence, context in enumerate(batch.context.tolist()):
            begin, end = starts[sequence], starts[sequence + 1]
            offset = context - (end - begin) - begin  # of positions from rows
            table = batch.tables[cache.group][sequence]
            for first, last in _aligned(begin + offset, context, tile):
                rows = slice(first - offset, last - offset)
                attend = self._attend_tiled if self.batch_invariant else _attend
                out[rows], lse[rows] = attend(queries[rows], first, context, table, cache, spec)
        return out.to(self.dtype).view(tokens, -1), lse.view(tokens, -1)

    def _attend_tiled(
        self, q: Tensor, first: int, context: int, table: Tensor, cache: KVCacheLayer, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries within one aligned tile, by an online softmax over aligned tiles of keys.

        The tile is filled up with rows of zeros before and after, and keys with zeros, so that every
        product has one shape and a query one row in it.
        """
        count = q.shape[0]
        origin = first - first % _QUERIES_PER_TILE
        padded = q.new_zeros(_QUERIES_PER_TILE, *q.shape[1:])
        inside = slice(first - origin, first - origin + count)
        padded[inside] = q
        # [kv_heads, heads of a group, 16, head_dim], the middle two as one dimension in products
        rows = padded.permute(1, 2, 0, 3)
        flat = rows.reshape(spec.kv_heads, -1, spec.head_dim)
        total = rows.new_zeros(rows.shape)
        weight = rows.new_zeros(rows.shape[:-1])
        highest = rows.new_full(rows.shape[:-1], -math.inf)
        positions = torch.arange(origin, origin + _QUERIES_PER_TILE)
        begin = 0 if spec.window is None else max(0, origin - spec.window + 1)
        for start in range(begin - begin % _KEYS_PER_TILE, origin + _QUERIES_PER_TILE, _KEYS_PER_TILE):
            keys, values = _read_pages(table, cache, start, _KEYS_PER_TILE, context)
            scores = (flat @ keys.transpose(-1, -2)).view(*rows.shape[:-1], _KEYS_PER_TILE)
            scores = _mask(_cap(scores * spec.scale, spec), positions, start, spec)
            reached = torch.maximum(highest, scores.amax(-1))
            base = torch.where(reached == -math.inf, 0.0, reached)
            fade = (highest - base).exp()
            shares = (scores - base.unsqueeze(-1)).exp()
            product = shares.view(spec.kv_heads, -1, _KEYS_PER_TILE) @ values
            total = total * fade.unsqueeze(-1) + product.view(rows.shape)
            weight = weight * fade + shares.sum(-1)
            highest = reached
        out = (total / weight.unsqueeze(-1)).permute(2, 0, 1, 3)
        lse = (highest + weight.log()).permute(2, 0, 1)
        return out[inside], lse[inside]

    def _in_tiles(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply to [rows, ...], in padded tiles of fixed shape where rows must not influence each other."""
        if not self.batch_invariant or x.shape[0] == 0:
            return function(x)
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % _ROWS_PER_TILE))
        return torch.cat([function(tile) for tile in torch.split(padded, _ROWS_PER_TILE)])[:rows]

    def _by_row(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply to [rows, ...], one row at a time where rows must not influence each other."""
        if not self.batch_invariant or x.shape[0] == 0:
            return function(x)
        return torch.stack([function(row.contiguous()) for row in x])


@cache
def _processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return "-".join(line.partition(":")[2].split())
    return platform.machine()


def _aligned(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut [first, last) at multiples of `size`."""
    while first < last:
        end = min(last, first - first % size + size)
        yield first, end
        first = end


def _attend(
    q: Tensor, first: int, context: int, table: Tensor, cache: KVCacheLayer, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """q [n, kv_heads, group, head_dim] at positions first.. → output, same shape, and log-sum-exp."""
    count = q.shape[0]
    begin = 0 if spec.window is None else max(0, first - spec.window + 1)
    keys, values = _read_pages(table, cache, begin, first + count - begin, context)
    scores = torch.einsum("nkgd,kld->kgnl", q, keys) * spec.scale
    scores = _mask(_cap(scores, spec), torch.arange(first, first + count), begin, spec)
    out = torch.einsum("kgnl,kld->nkgd", scores.softmax(-1), values)
    return out, scores.logsumexp(-1).permute(2, 0, 1)


def _cap(scores: Tensor, spec: AttentionSpec) -> Tensor:
    return scores if spec.softcap is None else spec.softcap * torch.tanh(scores / spec.softcap)


def _mask(scores: Tensor, positions: Tensor, first_key: int, spec: AttentionSpec) -> Tensor:
    """scores [..., queries, keys]: -inf where the query at `positions` must not see the key."""
    keys = torch.arange(first_key, first_key + scores.shape[-1])
    distance = positions[:, None] - keys
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    return scores.masked_fill(hidden, -math.inf)


def _read_pages(
    table: Tensor, cache: KVCacheLayer, first: int, count: int, context: int
) -> tuple[Tensor, Tensor]:
    """Keys and values at positions first.., [kv_heads, count, head_dim] float32 each.

    Zeros stand for positions that are not written or that a window has left behind: their weight is zero,
    but zero times what a page happens to hold need not be.
    """
    positions = torch.arange(first, first + count)
    blocks = (positions // cache.block_size).clamp(max=table.shape[0] - 1)
    pages = table[blocks].long()
    held = (positions < context) & (pages >= 0)
    entries = cache.pages[pages.clamp(min=0), cache.layer, :, positions % cache.block_size]
    entries = torch.where(held.view(-1, 1, 1, 1), entries.to(torch.float32), 0.0)
    keys, values = entries.permute(1, 2, 0, 3)
    return keys.contiguous(), values.contiguous()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], cos and sin [tokens, 1, head_dim / 2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
