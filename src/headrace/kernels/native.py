"""The CPU kernels in C++, on float32 or bfloat16: what `headrace serve` runs on without an accelerator.

This side checks types and shapes, provides memory, and passes addresses; `headrace._native` (in `native/`)
computes without the interpreter lock, on a thread pool of its own. Rows never influence each other: every sum
is taken in an order that the row's own position fixes, so batch invariance costs nothing and is always kept.

The layout of packed weights is described in `native/kernels/linear.cpp`, that of a KV page in
`native/src/kernels.h`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace import _native
from headrace.kernels.base import AttentionSpec, Build, Kernels, KVCacheLayer, Quantization
from headrace.kernels.batch import Batch
from headrace.kernels.huge_pages import Arena, Workspace, huge_zeros, pool_in
from headrace.kernels.int8 import check_inputs
from headrace.kernels.native_operations import (
    TYPES,
    NativeGatedLinear,
    NativeLinear,
    NativeOperations,
    Packed,
    Rotation,
    address,
    check_batch,
    pages_of,
)
from headrace.kernels.native_program import NativeProgram, capture

_INT8 = 2


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16, so that it is faster than float32."""
    return _native.level() in ("avx512", "amx")


class NativeKernels(NativeOperations, Kernels):
    """The kernels of `headrace._native`.

    dtype:           float32 or bfloat16; any processor computes both
    quantization:    of all packed weights
    batch_invariant: kept whether asked for or not
    threads:         of the pool that all native kernels of the process share; torch's own pool is then set to
                     one thread, since it would compete for the same cores. None leaves both as they are.
    """

    name = "native"

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quantization: Quantization = "none",
        batch_invariant: bool = True,
        threads: int | None = None,
    ) -> None:
        if dtype not in TYPES:
            raise ValueError(f"dtype is {dtype}; the native kernels support torch.float32 and torch.bfloat16")
        if threads is not None:
            _native.set_threads(threads)
            torch.set_num_threads(1)
        self.dtype = dtype
        self.quantization = quantization
        self.batch_invariant = True
        self._type = TYPES[dtype]
        self._packed_type = _INT8 if quantization == "int8" else self._type
        self._arena = Arena()
        self._workspace = Workspace()
        self._busy_before_s = _native.busy_s()

    @property
    def isa(self) -> str:
        """The instruction set in use: portable, avx2, avx512, amx; HEADRACE_NATIVE_ISA forces a lower one."""
        return _native.level()

    @property
    def numerics(self) -> str:
        name = f"{self.name}-{self.isa}"
        return name if self.quantization == "none" else f"{name}-{self.quantization}"

    @property
    def busy_s(self) -> float:
        """Seconds spent inside kernels since this object was made, by all such objects of the process."""
        return _native.busy_s() - self._busy_before_s

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        outputs, inputs = weight.shape
        packed = self._pack(weight, gated=False)
        padded = None if bias is None else _in_whole(bias.to(torch.float32), _native.PANEL)
        return NativeLinear(
            packed, padded, inputs, outputs, self._packed_type, packed.data_ptr(), address(padded)
        )

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> NativeGatedLinear:
        outputs, inputs = weight.shape
        if outputs % 2:
            raise ValueError(f"a gated weight has {outputs} rows; gate and up must be of one width")
        packed = self._pack(weight, gated=True)
        padded = None
        if bias is not None:
            half = _native.PANEL // 2
            gate, up = (_in_whole(part, half).view(-1, half) for part in bias.to(torch.float32).chunk(2))
            padded = torch.cat([gate, up], dim=1).flatten()
        return NativeGatedLinear(
            packed, padded, inputs, outputs // 2, self._packed_type, packed.data_ptr(), address(padded)
        )

    def _pack(self, weight: Tensor, *, gated: bool) -> Tensor:
        outputs, inputs = weight.shape
        if self._packed_type == _INT8:
            check_inputs(inputs)
        source = weight.detach().to(self.dtype).contiguous()
        packed = self._arena.take(_native.packed_bytes(outputs, inputs, self._packed_type))
        _native.pack(
            source.data_ptr(),
            outputs,
            inputs,
            source.stride(0),
            self._type,
            self._packed_type,
            gated,
            packed.data_ptr(),
        )
        return packed

    def allocate_kv(
        self,
        pages: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        memory: Tensor | None = None,
    ) -> Tensor:
        """[pages, elements of a page]; the memory is taken from the system as pages are first written."""
        if head_dim < 2 or head_dim % 2 or min(pages, layers, kv_heads, block_size) < 1:
            raise ValueError(
                f"no pages of {layers} layers, {kv_heads} kv heads of {head_dim}, {block_size} positions "
                f"({pages} asked for): each must be at least 1, and head_dim even"
            )
        elements = _native.page_elements(layers, kv_heads, head_dim, block_size)
        if memory is None:
            memory = huge_zeros(pages * elements * self.dtype.itemsize)
        return pool_in(memory, (pages, elements), self.dtype)

    def capture(self, build: Build, x: Tensor) -> NativeProgram:
        """All programs of these kernels share one workspace: they run one after another."""
        return capture(build, x, dtype=self.dtype, workspace=self._workspace)

    # ---- operations, computed at once ----------------------------------------------------------------

    def _new(self, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((like.shape[0], columns), dtype=dtype)

    def _embed(self, token_ids: Tensor, table: Tensor, scale: float, result: Tensor) -> None:
        vocab, columns = table.shape
        _native.embed(
            token_ids.data_ptr(),
            token_ids.shape[0],
            table.data_ptr(),
            vocab,
            columns,
            self._type,
            scale,
            result.data_ptr(),
        )

    def _soft_cap(self, x: Tensor, cap: float) -> None:
        rows, columns = x.shape
        _native.soft_cap(x.data_ptr(), rows, columns, cap)

    def _linear(
        self, x: Tensor, packed: Packed, outputs: int, gate: int, result: Tensor, output: int
    ) -> None:
        _native.linear(
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            packed.address,
            packed.bias_address,
            outputs,
            packed.in_features,
            self._type,
            packed.type,
            gate,
            result.data_ptr(),
            packed.out_features,
            output,
        )

    def _norm(self, x: Tensor, weight: Tensor, eps: float, result: Tensor, output: int) -> None:
        rows, columns = x.shape
        _native.rms_norm(x.data_ptr(), weight.data_ptr(), rows, columns, eps, result.data_ptr(), output)

    def _rotate(self, qkv: Tensor, batch: Batch, cache: KVCacheLayer, rotation: Rotation, q: Tensor) -> None:
        _native.rotate_and_store(
            qkv.data_ptr(),
            self._type,
            rotation.heads,
            *_places(batch, cache, qkv.shape[0]),
            rotation.cos_sin.data_ptr(),
            rotation.cos_sin.shape[0],
            address(rotation.q_norm),
            address(rotation.k_norm),
            rotation.eps,
            q.data_ptr(),
        )

    def _attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec, out: Tensor, lse: Tensor
    ) -> None:
        _native.attention(
            q.data_ptr(),
            self._type,
            spec.heads,
            *_places(batch, cache, q.shape[0]),
            spec.scale,
            spec.window or 0,
            spec.softcap or 0.0,
            out.data_ptr(),
            lse.data_ptr(),
        )


def _places(batch: Batch, cache: KVCacheLayer, tokens: int) -> tuple[int, ...]:
    """The arguments that say which token is where, and which page is whose."""
    check_batch(batch, cache.group, tokens)
    table = batch.tables[cache.group]
    return (
        batch.query_start.data_ptr(),
        batch.positions.data_ptr(),
        batch.query_start.shape[0] - 1,
        tokens,
        *pages_of(cache),
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
    )


def _in_whole(x: Tensor, size: int) -> Tensor:
    """x [n] with zeros to the next multiple of `size`."""
    return torch.nn.functional.pad(x, (0, -x.shape[0] % size))
