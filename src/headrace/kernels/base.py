"""What a decoder needs from a kernel library, and nothing else.

A `Kernels` object owns the precision, the packing of weights and the layout inside a KV page, so a model
never sees any of them. A model writes its forward pass once, over `Operations`, and hands it to
`Kernels.capture`, which gives a `Program`: the sequence of calls, ready to run for any number of rows. The
residual stream is float32 everywhere; `dtype` is that of weights, of the inputs of linear layers, and of
cached keys and values.

Every function works on ragged rows and must give each row the same bits whatever other rows are in the call
when `batch_invariant` is true (it then fixes how each sum is split by the row's own position alone).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.kernels.batch import Batch

Activation = Literal["silu", "gelu_tanh"]

Quantization = Literal["none", "int8"]
"""Of packed weights. int8: one scale for each output, and one for each row of the input as it comes; products
are summed as integers.
"""


class Linear(ABC):
    """A weight [out, in] packed for fast reading, with its optional bias [out]."""

    in_features: int
    out_features: int


class GatedLinear(ABC):
    """The projections gate and up of one input, both [ffn, in], packed as one, with their optional biases."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class KVCacheLayer:
    """Where one layer keeps its keys and values.

    pages: the tensor that `Kernels.allocate_kv` gave for the pool, shared by all groups.
    group: index into `Batch.tables`.
    layer: index of the layer inside its group, and so inside each page.
    """

    pages: Tensor
    group: int
    layer: int
    kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constants of one layer's attention.

    scale:   multiplies q·k
    window:  a query at position p sees keys in (p - window, p]; None sees all of [0, p]
    softcap: scores become softcap * tanh(scores / softcap); None leaves them
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


class Operations(ABC):
    """What a forward pass is written in. Tensors of activations are [rows, ...]; a program has any number."""

    dtype: torch.dtype

    @abstractmethod
    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        """token_ids [T] int32, table [vocab, hidden] of `dtype` → rows of the table times scale, float32."""

    @abstractmethod
    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """x [T, n] float32 becomes cap * tanh(x / cap), in place, and is returned."""

    @abstractmethod
    def linear(
        self, x: Tensor, packed: Linear, *, out_dtype: torch.dtype | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """x [T, in] of `dtype` → x · weightᵀ + bias [T, out], accumulated in float32 or, of int8, exactly.

        The result has `out_dtype` (default `dtype`; float32 for logits and for Gemma's post-norms).
        With `add_to` [T, out] float32 it is added to that tensor in place, unrounded, and that tensor is
        returned.
        """

    @abstractmethod
    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] float32 → x / rms(x) * weight, as `dtype`; weight [hidden] float32, offset included.

        With `add_to` [T, hidden] float32 the float32 result is added to it in place and it is returned.
        """

    @abstractmethod
    def gated_linear(self, x: Tensor, packed: GatedLinear, activation: Activation) -> Tensor:
        """x [T, in] of `dtype` → act(gate(x)) * up(x), [T, ffn] of `dtype`.

        gate(x) and up(x) are rounded to `dtype` as `linear` would, the rest is float32 until the end.
        """

    @abstractmethod
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
        """Split qkv [T, (heads + 2 * kv_heads) * head_dim] of `dtype`, rotate, write keys and values.

        Where given, q_norm and k_norm [head_dim] float32 apply an RMS norm to each head first.
        cos_sin is [max_positions, head_dim] float32: cosines in the first half of a row, sines in the
        second; rotation pairs dimension i with i + head_dim / 2 (the "neox" pairing that Hugging Face
        checkpoints use). Keys and values of token t go to the page of its position in `cache`.
        Returns the rotated q, [T, heads * head_dim] of `dtype`.
        """

    @abstractmethod
    def attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """Causal grouped-query attention that reads the KV pages in place.

        q: [T, heads * head_dim] of `dtype`. Returns the output, same shape and dtype, and the natural
        log-sum-exp of the scores, [T, heads] float32, with which partial results can be merged.
        """


class Program(ABC):
    """A captured sequence of operations."""

    @abstractmethod
    def run(self, x: Tensor, batch: Batch) -> Tensor:
        """What the captured function gives for x [rows, ...], as a tensor of the caller's own."""


Build = Callable[[Operations, Tensor, Batch], Tensor]
"""A forward pass: what to do with x [rows, ...] of a batch, in operations alone."""


class Kernels(Operations):
    """One implementation of the operations of a decoder on one device."""

    name: str
    quantization: Quantization
    batch_invariant: bool

    @property
    def numerics(self) -> str:
        """Names this library's arithmetic: equal names give equal bits for equal weights."""
        return self.name

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds spent inside kernels since this object was made."""

    @abstractmethod
    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] (any float dtype) and bias [out] once, at load, quantised as said."""

    @abstractmethod
    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> GatedLinear:
        """Pack weight [2 * ffn, in] and bias [2 * ffn], rows of gate before those of up, once, at load."""

    @abstractmethod
    def allocate_kv(
        self,
        pages: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        memory: Tensor | None = None,
    ) -> Tensor:
        """A zeroed pool, [pages, ...]: a page holds `layers` layers of `block_size` positions.

        Block-major: with n the bytes of a page, page i is the bytes [i * n, (i + 1) * n) of the pool, and no
        others; a page copied byte by byte to another pool of these shapes means the same there. The pool is
        laid into `memory`, [pages * n] zeros of uint8 that start at a multiple of 64 bytes, where that is
        given.
        """

    @abstractmethod
    def capture(self, build: Build, x: Tensor) -> Program:
        """Record `build` for inputs of x's type and columns (x may be on the "meta" device), once, at load.

        `build` may read nothing of x and the batch but shapes: it runs now, or again for each run. The tensor
        that it returns must be one that an operation made.
        """
