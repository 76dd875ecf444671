"""The CPU kernels in C++, on float32 or bfloat16: what `headrace serve` runs on without an accelerator.

This side checks types and shapes, provides memory, and passes addresses; `headrace._native` (in `native/`)
computes without the interpreter lock, on a thread pool of its own. Rows never influence each other: every sum
is taken in an order that the row's own position fixes, so batch invariance costs nothing and is always kept.

The layout of packed weights is described in `native/kernels/linear.cpp`, that of a KV page in
`native/src/kernels.h`.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import _native
from headrace.kernels.base import (
    Activation,
    AttentionSpec,
    GatedLinear,
    Kernels,
    KVCacheLayer,
    Linear,
    Quantization,
)
from headrace.kernels.batch import Batch
from headrace.kernels.int8 import check_inputs

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_INT8 = 2
_ADD = 2
_NO_GATE = 0
_GATES: dict[Activation, int] = {"silu": 1, "gelu_tanh": 2}

_HUGE_PAGE_BYTES = 2 << 20
_ARENA_BYTES = 64 << 20
_ALIGNMENT_BYTES = 4096


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16, so that it is faster than float32."""
    return _native.level() in ("avx512", "amx")


@dataclass(frozen=True, slots=True)
class _Packed:
    """packed: bytes of the panels, of `type`. bias: [columns of the panels] float32, in their order."""

    packed: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    type: int
    address: int
    bias_address: int


class NativeLinear(_Packed, Linear):
    """A linear layer in panels."""

    __slots__ = ()


class NativeGatedLinear(_Packed, GatedLinear):
    """A gated layer in panels that hold columns of gate beside the same columns of up."""

    __slots__ = ()


class NativeKernels(Kernels):
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
        if dtype not in _TYPES:
            raise ValueError(f"dtype is {dtype}; the native kernels support torch.float32 and torch.bfloat16")
        if threads is not None:
            _native.set_threads(threads)
            torch.set_num_threads(1)
        self.dtype = dtype
        self.quantization = quantization
        self.batch_invariant = True
        self._type = _TYPES[dtype]
        self._packed_type = _INT8 if quantization == "int8" else self._type
        self._arena = _Arena()
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
            packed, padded, inputs, outputs, self._packed_type, packed.data_ptr(), _address(padded)
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
            packed, padded, inputs, outputs // 2, self._packed_type, packed.data_ptr(), _address(padded)
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

    def linear(
        self, x: Tensor, packed: Linear, *, out_dtype: torch.dtype | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        assert isinstance(packed, NativeLinear)
        shape = (x.shape[0], packed.out_features)
        if add_to is None:
            result = torch.empty(shape, dtype=out_dtype or self.dtype)
            output = _TYPES[result.dtype]
        else:
            result = _float32(add_to, "add_to", shape)
            output = _ADD
        self._multiply(x, packed, packed.out_features, _NO_GATE, result, output)
        return result

    def gated_linear(self, x: Tensor, packed: GatedLinear, activation: Activation) -> Tensor:
        assert isinstance(packed, NativeGatedLinear)
        result = torch.empty((x.shape[0], packed.out_features), dtype=self.dtype)
        self._multiply(x, packed, 2 * packed.out_features, _GATES[activation], result, self._type)
        return result

    def _multiply(
        self, x: Tensor, packed: _Packed, outputs: int, gate: int, result: Tensor, output: int
    ) -> None:
        rows, inputs = x.shape
        if inputs != packed.in_features or x.dtype is not self.dtype:
            raise ValueError(
                f"x is [{rows}, {inputs}] {x.dtype}; this layer takes [tokens, {packed.in_features}] "
                f"{self.dtype}"
            )
        row_stride, column_stride = x.stride()
        if column_stride != 1:
            x = x.contiguous()
            row_stride = inputs
        _native.linear(
            x.data_ptr(),
            rows,
            row_stride,
            packed.address,
            packed.bias_address,
            outputs,
            inputs,
            self._type,
            packed.type,
            gate,
            result.data_ptr(),
            packed.out_features,
            output,
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, add_to: Tensor | None = None) -> Tensor:
        rows, columns = x.shape
        _float32(x, "x", (rows, columns))
        _float32(weight, "weight", (columns,))
        if add_to is None:
            result = torch.empty((rows, columns), dtype=self.dtype)
            output = self._type
        else:
            result = _float32(add_to, "add_to", (rows, columns))
            output = _ADD
        _native.rms_norm(x.data_ptr(), weight.data_ptr(), rows, columns, eps, result.data_ptr(), output)
        return result

    def allocate_kv(self, pages: int, layers: int, kv_heads: int, head_dim: int, block_size: int) -> Tensor:
        """[pages, elements of a page]; the memory is taken from the system as pages are first written."""
        if head_dim < 2 or head_dim % 2 or min(pages, layers, kv_heads, block_size) < 1:
            raise ValueError(
                f"no pages of {layers} layers, {kv_heads} kv heads of {head_dim}, {block_size} positions "
                f"({pages} asked for): each must be at least 1, and head_dim even"
            )
        elements = _native.page_elements(layers, kv_heads, head_dim, block_size)
        memory = _huge_zeros(pages * elements * self.dtype.itemsize)
        return memory.view(self.dtype).view(pages, elements)

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
        head_dim = spec.head_dim
        tokens, columns = qkv.shape
        self._check(qkv, "qkv")
        if columns != (spec.heads + 2 * spec.kv_heads) * head_dim:
            raise ValueError(
                f"qkv has {columns} columns; {spec.heads} heads and twice {spec.kv_heads} kv heads of "
                f"{head_dim} are {(spec.heads + 2 * spec.kv_heads) * head_dim}"
            )
        _float32(cos_sin, "cos_sin", (cos_sin.shape[0], head_dim))
        q = torch.empty((tokens, spec.heads * head_dim), dtype=self.dtype)
        _native.rotate_and_store(
            qkv.data_ptr(),
            self._type,
            spec.heads,
            *self._places(batch, cache, tokens),
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            0 if q_norm is None else _float32(q_norm, "q_norm", (head_dim,)).data_ptr(),
            0 if k_norm is None else _float32(k_norm, "k_norm", (head_dim,)).data_ptr(),
            eps,
            q.data_ptr(),
        )
        return q

    def attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        tokens, columns = q.shape
        self._check(q, "q")
        if columns != spec.heads * spec.head_dim or spec.heads % spec.kv_heads:
            raise ValueError(
                f"q has {columns} columns; expected {spec.heads} heads of {spec.head_dim}, and as many for "
                f"each of {spec.kv_heads} kv heads"
            )
        out = torch.empty_like(q)
        lse = torch.empty((tokens, spec.heads))
        _native.attention(
            q.data_ptr(),
            self._type,
            spec.heads,
            *self._places(batch, cache, tokens),
            spec.scale,
            spec.window or 0,
            spec.softcap or 0.0,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def _check(self, x: Tensor, name: str) -> None:
        if x.dtype is not self.dtype or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} with strides {x.stride()}; expected contiguous rows of {self.dtype}"
            )

    def _places(self, batch: Batch, cache: KVCacheLayer, tokens: int) -> tuple[int, ...]:
        """The arguments that say which token is where, and which page is whose."""
        positions, query_start, table = batch.positions, batch.query_start, batch.tables[cache.group]
        if not (positions.dtype is query_start.dtype is table.dtype is torch.int32):
            raise ValueError("positions, query_start and tables of a batch are int32")
        if positions.shape[0] != tokens or query_start.shape[0] > table.shape[0] + 1:
            raise ValueError(
                f"a batch of {positions.shape[0]} positions, {query_start.shape[0] - 1} sequences and "
                f"{table.shape[0]} block tables came with {tokens} rows"
            )
        pages = cache.pages
        return (
            query_start.data_ptr(),
            positions.data_ptr(),
            query_start.shape[0] - 1,
            tokens,
            pages.data_ptr(),
            pages.shape[0],
            pages.stride(0),
            cache.layer,
            cache.kv_heads,
            cache.head_dim,
            cache.block_size,
            table.data_ptr(),
            table.stride(0),
            table.shape[1],
        )


def _float32(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if x.dtype is not torch.float32 or not x.is_contiguous() or x.shape != shape:
        raise ValueError(
            f"{name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; expected contiguous {shape} "
            "float32"
        )
    return x


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _in_whole(x: Tensor, size: int) -> Tensor:
    """x [n] with zeros to the next multiple of `size`."""
    return torch.nn.functional.pad(x, (0, -x.shape[0] % size))


class _Arena:
    """Weights one after the other in huge pages: a step reads them nearly as fast as memory can be read."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """[size] uint8, page-aligned. A chunk lives as long as any part of it."""
        start = -(-self._used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if start + size > self._chunk.shape[0]:
            self._chunk = _huge_zeros(max(size, _ARENA_BYTES))
            start = 0
        self._used = start + size
        return self._chunk[start : start + size]


def _huge_zeros(size: int) -> Tensor:
    """[size] uint8 zeros in huge pages where the system gives them, else in ordinary ones."""
    # Private: shared memory has a setting of its own for huge pages, which systems leave at "never".
    memory = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A system built without huge pages refuses: slower, and nothing else.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + size]
