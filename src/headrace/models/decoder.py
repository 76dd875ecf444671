"""The decoder: embeddings, layers of attention and feed-forward over a float32 residual stream, logits.

Flows in: a `Batch`. Flows out: hidden states, and logits for the rows that ask. Everything that does not
change from step to step is built before: weights are packed, rotary tables filled, KV layers bound. It
knows nothing of precision, packing or the layout of pages, which are the kernels', nor of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.base import AttentionSpec, GatedLinear, Kernels, KVCacheLayer, Linear
from headrace.kernels.batch import Batch
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

    def forward(self, batch: Batch) -> Tensor:
        """The residual stream after the last layer, before the final norm: [tokens, hidden] float32.

        Writes the keys and values of all tokens of the batch.
        """
        hidden = F.embedding(batch.token_ids, self._embedding).to(torch.float32)
        if self.config.embedding_scale != 1.0:
            hidden *= self.config.embedding_scale
        for layer, cache in zip(self._layers, self._caches, strict=True):
            self._attend(hidden, layer, cache, batch)
            self._feed_forward(hidden, layer)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] from `forward` → [rows, vocab] float32, soft-capped where the model is."""
        normed = self.kernels.rms_norm(hidden, self._norm, self.config.norm_eps)
        logits = self.kernels.linear(normed, self._head, out_dtype=torch.float32)
        cap = self.config.logit_softcap
        if cap is not None:
            # One row at a time: torch's vectorised tanh rounds the last few elements of a call differently,
            # and a row's logits must not depend on how many rows there are.
            for row in logits:
                row.div_(cap).tanh_().mul_(cap)
        return logits

    def _attend(self, hidden: Tensor, layer: DecoderLayer, cache: KVCacheLayer, batch: Batch) -> None:
        kernels, eps = self.kernels, self.config.norm_eps
        normed = kernels.rms_norm(hidden, layer.attention_norm, eps)
        qkv = kernels.linear(normed, layer.qkv)
        q = kernels.rotate_and_store(
            qkv, batch, cache, layer.attention, layer.cos_sin, layer.q_norm, layer.k_norm, eps
        )
        attended, _ = kernels.attention(q, batch, cache, layer.attention)
        self._add_projection(hidden, attended, layer.output, layer.attention_post_norm)

    def _feed_forward(self, hidden: Tensor, layer: DecoderLayer) -> None:
        kernels = self.kernels
        normed = kernels.rms_norm(hidden, layer.ffn_norm, self.config.norm_eps)
        gated = kernels.gated_linear(normed, layer.gate_up, self.config.activation)
        self._add_projection(hidden, gated, layer.down, layer.ffn_post_norm)

    def _add_projection(
        self, hidden: Tensor, x: Tensor, projection: Linear, post_norm: Tensor | None
    ) -> None:
        """hidden += projection(x), normed first where the family does."""
        if post_norm is None:
            self.kernels.linear(x, projection, add_to=hidden)
        else:
            projected = self.kernels.linear(x, projection, out_dtype=torch.float32)
            self.kernels.rms_norm(projected, post_norm, self.config.norm_eps, add_to=hidden)
