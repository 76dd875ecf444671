"""The decoder: embeddings, layers of attention and feed-forward over a float32 residual stream, logits.

Flows in: a `Batch`. Flows out: hidden states, and logits for the rows that ask. Everything that does not
change from step to step is built before: weights are packed, rotary tables filled, KV layers bound. It
knows nothing of precision, packing or the layout of pages, which are the kernels', nor of requests.

The forward pass is written in `Operations` and captured twice, as what leads from tokens to hidden states and
as what leads from those to logits, since only some rows ask for logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.base import (
    AttentionSpec,
    GatedLinear,
    Kernels,
    KVCacheLayer,
    Linear,
    Operations,
    Program,
)
from headrace.kernels.batch import Batch, no_sequences
from headrace.models.config import ModelConfig
from headrace.models.kv_groups import KVGroup


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's packed weights and constants.

    attention_norm, ffn_norm:           [hidden] float32, before attention and before the feed-forward
    attention_post_norm, ffn_post_norm: [hidden] float32, on their outputs, or None
    q_norm, k_norm:                     [head_dim] float32 or None
    qkv:      hidden → (heads + 2 * kv_heads) * head_dim, queries first, then keys, then values
    gate_up:  hidden → ffn, gate and up in one
    cos_sin:  [max_model_len, head_dim] float32, shared between layers of a kind
    """

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    attention_post_norm: Tensor | None
    ffn_norm: Tensor
    gate_up: GatedLinear
    down: Linear
    ffn_post_norm: Tensor | None
    attention: AttentionSpec
    cos_sin: Tensor


class Decoder:
    """One decoder on one device. `attach_kv` must come before the first `forward`.

    embedding: [vocab, hidden] of the kernels' dtype
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        *,
        max_model_len: int,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.max_model_len = max_model_len
        self._embedding = embedding
        self._layers = tuple(layers)
        self._norm = norm
        self._head = head
        self._caches: tuple[KVCacheLayer, ...] = ()
        self._to_hidden: Program | None = None
        rows = torch.empty((1, config.hidden_size), device="meta")
        self._to_logits = kernels.capture(self._compute_logits, rows)
        self._no_sequences = no_sequences()

    def attach_kv(self, pages: Tensor, groups: Sequence[KVGroup], block_size: int) -> None:
        """Keep keys and values in `pages`, which `Kernels.allocate_kv` gave for groups of this size.

        `groups` are in the order of `Batch.tables`, and together hold each layer once.
        """
        caches = {
            index: KVCacheLayer(pages, group, place, self.config.kv_heads, self.config.head_dim, block_size)
            for group, members in enumerate(groups)
            for place, index in enumerate(members.layers)
        }
        held = sorted(index for members in groups for index in members.layers)
        if held != list(range(self.config.layers)):
            raise ValueError(
                f"KV groups hold layers {held}; the model has 0 to {self.config.layers - 1}, each once"
            )
        self._caches = tuple(caches[index] for index in range(self.config.layers))
        token_ids = torch.empty(1, dtype=torch.int32, device="meta")
        self._to_hidden = self.kernels.capture(self._compute_hidden, token_ids)

    def forward(self, batch: Batch) -> Tensor:
        """The residual stream after the last layer, before the final norm: [tokens, hidden] float32.

        Writes the keys and values of all tokens of the batch.
        """
        if self._to_hidden is None:
            raise RuntimeError("attach_kv must come before forward")
        return self._to_hidden.run(batch.token_ids, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] from `forward` → [rows, vocab] float32, soft-capped where the model is."""
        return self._to_logits.run(hidden, self._no_sequences)

    def _compute_hidden(self, ops: Operations, token_ids: Tensor, batch: Batch) -> Tensor:
        hidden = ops.embed(token_ids, self._embedding, self.config.embedding_scale)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            self._attend(ops, hidden, layer, cache, batch)
            self._feed_forward(ops, hidden, layer)
        return hidden

    def _compute_logits(self, ops: Operations, hidden: Tensor, _: Batch) -> Tensor:
        normed = ops.rms_norm(hidden, self._norm, self.config.norm_eps)
        logits = ops.linear(normed, self._head, out_dtype=torch.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else ops.soft_cap(logits, cap)

    def _attend(
        self, ops: Operations, hidden: Tensor, layer: DecoderLayer, cache: KVCacheLayer, batch: Batch
    ) -> None:
        eps = self.config.norm_eps
        normed = ops.rms_norm(hidden, layer.attention_norm, eps)
        qkv = ops.linear(normed, layer.qkv)
        q = ops.rotate_and_store(
            qkv, batch, cache, layer.attention, layer.cos_sin, layer.q_norm, layer.k_norm, eps
        )
        attended, _ = ops.attention(q, batch, cache, layer.attention)
        self._add_projection(ops, hidden, attended, layer.output, layer.attention_post_norm)

    def _feed_forward(self, ops: Operations, hidden: Tensor, layer: DecoderLayer) -> None:
        normed = ops.rms_norm(hidden, layer.ffn_norm, self.config.norm_eps)
        gated = ops.gated_linear(normed, layer.gate_up, self.config.activation)
        self._add_projection(ops, hidden, gated, layer.down, layer.ffn_post_norm)

    def _add_projection(
        self, ops: Operations, hidden: Tensor, x: Tensor, projection: Linear, post_norm: Tensor | None
    ) -> None:
        """hidden += projection(x), normed first where the family does."""
        if post_norm is None:
            ops.linear(x, projection, add_to=hidden)
        else:
            projected = ops.linear(x, projection, out_dtype=torch.float32)
            ops.rms_norm(projected, post_norm, self.config.norm_eps, add_to=hidden)
