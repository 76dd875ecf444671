"""What computing now and recording for later have in common: types, shapes, and what a call needs to know.

Flows in: tensors of a forward pass. Flows out: checked arguments for one call, and a tensor for its result.
What the call does, and what stands behind a tensor, is the subclass's: `NativeKernels` calls the module
at once, `Recorder` writes the call down.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.base import (
    Activation,
    AttentionSpec,
    GatedLinear,
    KVCacheLayer,
    Linear,
    Operations,
)
from headrace.kernels.batch import Batch

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ADD = 2
_NO_GATE = 0
_GATES: dict[Activation, int] = {"silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, slots=True)
class Packed:
    """packed: bytes of the panels, of `type`. bias: [columns of the panels] float32, in their order."""

    packed: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    type: int
    address: int
    bias_address: int


class NativeLinear(Packed, Linear):
    """A linear layer in panels."""

    __slots__ = ()


class NativeGatedLinear(Packed, GatedLinear):
    """A gated layer in panels that hold columns of gate beside the same columns of up."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Rotation:
    """The constants of `rotate_and_store`."""

    heads: int
    cos_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


class NativeOperations(Operations):
    """The operations of `headrace._native`, with their arguments checked."""

    _type: int  # of `dtype`

    # ---- for subclasses ------------------------------------------------------------------------------

    @abstractmethod
    def _new(self, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """A tensor [rows of `like`, columns] for a result."""

    @abstractmethod
    def _embed(self, token_ids: Tensor, table: Tensor, scale: float, result: Tensor) -> None: ...

    @abstractmethod
    def _soft_cap(self, x: Tensor, cap: float) -> None: ...

    @abstractmethod
    def _linear(
        self, x: Tensor, packed: Packed, outputs: int, gate: int, result: Tensor, output: int
    ) -> None: ...

    @abstractmethod
    def _norm(self, x: Tensor, weight: Tensor, eps: float, result: Tensor, output: int) -> None: ...

    @abstractmethod
    def _rotate(
        self, qkv: Tensor, batch: Batch, cache: KVCacheLayer, rotation: Rotation, q: Tensor
    ) -> None: ...

    @abstractmethod
    def _attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec, out: Tensor, lse: Tensor
    ) -> None: ...

    # ---- the operations ------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        if token_ids.dtype is not torch.int32 or not token_ids.is_contiguous():
            raise ValueError(f"token_ids is {token_ids.dtype}; expected contiguous int32")
        self._check(table, "table")
        result = self._new(token_ids, table.shape[1], torch.float32)
        self._embed(token_ids, table, scale, result)
        return result

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        self._soft_cap(_float32(x, "x", tuple(x.shape)), cap)
        return x

    def linear(
        self, x: Tensor, packed: Linear, *, out_dtype: torch.dtype | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        assert isinstance(packed, NativeLinear)
        if add_to is None:
            result = self._new(x, packed.out_features, out_dtype or self.dtype)
            output = TYPES[result.dtype]
        else:
            result = _float32(add_to, "add_to", (x.shape[0], packed.out_features))
            output = _ADD
        self._linear(self._inputs(x, packed), packed, packed.out_features, _NO_GATE, result, output)
        return result

    def gated_linear(self, x: Tensor, packed: GatedLinear, activation: Activation) -> Tensor:
        assert isinstance(packed, NativeGatedLinear)
        result = self._new(x, packed.out_features, self.dtype)
        outputs = 2 * packed.out_features
        self._linear(self._inputs(x, packed), packed, outputs, _GATES[activation], result, self._type)
        return result

    def _inputs(self, x: Tensor, packed: Packed) -> Tensor:
        rows, inputs = x.shape
        if inputs != packed.in_features or x.dtype is not self.dtype:
            raise ValueError(
                f"x is [{rows}, {inputs}] {x.dtype}; this layer takes [tokens, {packed.in_features}] "
                f"{self.dtype}"
            )
        return x if x.stride(1) == 1 else x.contiguous()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, add_to: Tensor | None = None) -> Tensor:
        rows, columns = x.shape
        _float32(x, "x", (rows, columns))
        _float32(weight, "weight", (columns,))
        if add_to is None:
            result = self._new(x, columns, self.dtype)
            output = self._type
        else:
            result = _float32(add_to, "add_to", (rows, columns))
            output = _ADD
        self._norm(x, weight, eps, result, output)
        return result

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
        columns = qkv.shape[1]
        self._check(qkv, "qkv")
        if columns != (spec.heads + 2 * spec.kv_heads) * head_dim:
            raise ValueError(
                f"qkv has {columns} columns; {spec.heads} heads and twice {spec.kv_heads} kv heads of "
                f"{head_dim} are {(spec.heads + 2 * spec.kv_heads) * head_dim}"
            )
        _float32(cos_sin, "cos_sin", (cos_sin.shape[0], head_dim))
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                _float32(norm, name, (head_dim,))
        q = self._new(qkv, spec.heads * head_dim, self.dtype)
        self._rotate(qkv, batch, cache, Rotation(spec.heads, cos_sin, q_norm, k_norm, eps), q)
        return q

    def attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        columns = q.shape[1]
        self._check(q, "q")
        if columns != spec.heads * spec.head_dim or spec.heads % spec.kv_heads:
            raise ValueError(
                f"q has {columns} columns; expected {spec.heads} heads of {spec.head_dim}, and as many for "
                f"each of {spec.kv_heads} kv heads"
            )
        out = self._new(q, columns, self.dtype)
        lse = self._new(q, spec.heads, torch.float32)
        self._attention(q, batch, cache, spec, out, lse)
        return out, lse

    def _check(self, x: Tensor, name: str) -> None:
        if x.dtype is not self.dtype or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} with strides {x.stride()}; expected contiguous rows of {self.dtype}"
            )


def address(x: Tensor | None) -> int:
    """Where a tensor's values begin; 0 for none."""
    return 0 if x is None else x.data_ptr()


def check_batch(batch: Batch, group: int, rows: int) -> None:
    """ValueError unless the batch has the types of one, and tables for all sequences of its `rows` tokens."""
    positions, query_start, table = batch.positions, batch.query_start, batch.tables[group]
    if not (positions.dtype is query_start.dtype is table.dtype is torch.int32):
        raise ValueError("positions, query_start and tables of a batch are int32")
    if positions.shape[0] != rows or query_start.shape[0] > table.shape[0] + 1:
        raise ValueError(
            f"a batch of {positions.shape[0]} positions, {query_start.shape[0] - 1} sequences and "
            f"{table.shape[0]} block tables came with {rows} rows"
        )


def pages_of(cache: KVCacheLayer) -> tuple[int, ...]:
    """Where a layer's pages are, as every call takes them."""
    pages = cache.pages
    return (
        pages.data_ptr(),
        pages.shape[0],
        pages.stride(0),
        cache.layer,
        cache.kv_heads,
        cache.head_dim,
        cache.block_size,
    )


def _float32(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if x.dtype is not torch.float32 or not x.is_contiguous() or x.shape != shape:
        raise ValueError(
            f"{name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; expected contiguous {shape} "
            "float32"
        )
    return x
