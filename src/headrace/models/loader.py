"""From a model directory to a `Decoder`: names of tensors, their shapes and cuts, and packing layer by layer.

Layers are loaded, packed and dropped one after another, so memory peaks at the packed weights and one layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.kernels.base import AttentionSpec, Kernels, Linear
from headrace.models.config import ModelConfig, Rotary, UnsupportedModelError
from headrace.models.decoder import Decoder, DecoderLayer
from headrace.models.families import WeightNames, find_family, read_config
from headrace.models.rotary import cos_sin_table
from headrace.models.weights import WHOLE, Checkpoint, Part, WeightsError


@dataclass(frozen=True, slots=True)
class FusedParts:
    """Projections of one input computed as one: their weights, and biases or nothing, one below the other."""

    weights: tuple[Part, ...]
    biases: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer reads from the checkpoint; fields as in `DecoderLayer`."""

    attention_norm: Part
    qkv: FusedParts
    q_norm: Part | None
    k_norm: Part | None
    output: FusedParts
    attention_post_norm: Part | None
    ffn_norm: Part
    gate_up: FusedParts
    down: FusedParts
    ffn_post_norm: Part | None

    def __iter__(self) -> Iterator[Part]:
        for fused in (self.qkv, self.output, self.gate_up, self.down):
            yield from fused.weights
            yield from fused.biases
        for part in (
            self.attention_norm,
            self.q_norm,
            self.k_norm,
            self.attention_post_norm,
            self.ffn_norm,
            self.ffn_post_norm,
        ):
            if part is not None:
                yield part


def layer_parts(config: ModelConfig, names: WeightNames, prefix: str) -> LayerParts:
    """The parts of the layer whose tensors' names begin with `prefix`."""
    hidden, ffn, head_dim = config.hidden_size, config.ffn_size, config.head_dim
    heads, kv_heads = config.heads, config.kv_heads

    def norm(name: str, size: int = hidden) -> Part:
        return Part(f"{prefix}{name}.weight", (size,))

    def columns(bias: bool, *projections: tuple[str, int, int]) -> FusedParts:
        """Projections (name, outputs, units) whose outputs ranks share."""
        return FusedParts(
            tuple(
                Part(f"{prefix}{name}.weight", (size, hidden), "rows", units)
                for name, size, units in projections
            ),
            tuple(Part(f"{prefix}{name}.bias", (size,), "rows", units) for name, size, units in projections)
            if bias
            else (),
        )

    def rows(bias: bool, name: str, size: int, units: int) -> FusedParts:
        """A projection whose inputs ranks share, so that their outputs add up."""
        return FusedParts(
            (Part(f"{prefix}{name}.weight", (hidden, size), "columns", units),),
            (Part(f"{prefix}{name}.bias", (hidden,), "first"),) if bias else (),
        )

    return LayerParts(
        attention_norm=norm("input_layernorm"),
        qkv=columns(
            config.qkv_bias,
            ("self_attn.q_proj", heads * head_dim, heads),
            ("self_attn.k_proj", kv_heads * head_dim, kv_heads),
            ("self_attn.v_proj", kv_heads * head_dim, kv_heads),
        ),
        q_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
        output=rows(config.o_bias, "self_attn.o_proj", heads * head_dim, heads),
        attention_post_norm=norm(names.attention_post_norm) if config.post_norms else None,
        ffn_norm=norm(names.ffn_norm),
        gate_up=columns(config.mlp_bias, ("mlp.gate_proj", ffn, ffn), ("mlp.up_proj", ffn, ffn)),
        down=rows(config.mlp_bias, "mlp.down_proj", ffn, ffn),
        ffn_post_norm=norm(names.ffn_post_norm) if config.post_norms else None,
    )


def load_decoder(directory: Path, kernels: Kernels, max_model_len: int) -> Decoder:
    """Load a model directory in Hugging Face layout.

    max_model_len: the longest sequence that will be served, in tokens
    Raises UnsupportedModelError for what config.json asks, WeightsError for tensors that do not fit it.
    """
    values = json.loads((directory / "config.json").read_text())
    config = read_config(values)
    if not 0 < max_model_len <= config.max_positions:
        raise UnsupportedModelError(
            f"max_model_len is {max_model_len}; this model's positions reach from 1 to {config.max_positions}"
        )
    with Checkpoint(directory) as checkpoint:
        return _Loader(config, find_family(values).names, checkpoint, kernels, max_model_len).load()


class _Loader:
    """Describes, checks, then reads and packs."""

    def __init__(
        self,
        config: ModelConfig,
        names: WeightNames,
        checkpoint: Checkpoint,
        kernels: Kernels,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._max_model_len = max_model_len
        self._tables: dict[Rotary, Tensor] = {}
        place = _prefix_in_use(names, checkpoint)
        prefix = names.prefixes[place]
        self._embedding = Part(f"{prefix}embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._norm = Part(f"{prefix}norm.weight", (config.hidden_size,))
        self._layers = [
            layer_parts(config, names, f"{prefix}layers.{index}.") for index in range(config.layers)
        ]
        self._head = Part(names.heads[place], (config.vocab_size, config.hidden_size), "vocabulary")
        self._foreign = names.foreign

    def load(self) -> Decoder:
        self._check()
        embedding = self._checkpoint.load([self._embedding], WHOLE, self._kernels.dtype)
        if self._config.tied_embeddings:
            head = self._kernels.pack_linear(embedding, None)
        else:
            head = self._pack(FusedParts((self._head,), ()))
        layers = [self._layer(index, parts) for index, parts in enumerate(self._layers)]
        return Decoder(
            self._config,
            self._kernels,
            max_model_len=self._max_model_len,
            embedding=embedding,
            layers=layers,
            norm=self._load_norm(self._norm),
            head=head,
        )

    def _check(self) -> None:
        parts = [self._embedding, self._norm, *(part for layer in self._layers for part in layer)]
        tied, head = self._config.tied_embeddings, self._head.name
        if not tied or head in self._checkpoint.names:
            parts.append(self._head)
        ignored = [
            name
            for name in self._checkpoint.names
            if name.startswith(self._foreign) or name.endswith("rotary_emb.inv_freq")
        ]
        self._checkpoint.check(parts, ignored=ignored)
        if tied and head in self._checkpoint.names and not self._checkpoint.same(head, self._embedding.name):
            raise WeightsError(
                f"config.json ties the output projection to the embeddings, but {head} differs from "
                f"{self._embedding.name}; if it is meant, set tie_word_embeddings to false"
            )

    def _layer(self, index: int, parts: LayerParts) -> DecoderLayer:
        config = self._config
        kind = config.layer_kinds[index]
        if kind.rotary not in self._tables:
            self._tables[kind.rotary] = cos_sin_table(kind.rotary, config.head_dim, self._max_model_len)
        return DecoderLayer(
            attention_norm=self._load_norm(parts.attention_norm),
            qkv=self._pack(parts.qkv),
            q_norm=self._load_optional_norm(parts.q_norm),
            k_norm=self._load_optional_norm(parts.k_norm),
            output=self._pack(parts.output),
            attention_post_norm=self._load_optional_norm(parts.attention_post_norm),
            ffn_norm=self._load_norm(parts.ffn_norm),
            gate_up=self._kernels.pack_gated(*self._load_fused(parts.gate_up)),
            down=self._pack(parts.down),
            ffn_post_norm=self._load_optional_norm(parts.ffn_post_norm),
            attention=AttentionSpec(
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                scale=config.attention_scale,
                window=kind.window,
                softcap=config.attention_softcap,
            ),
            cos_sin=self._tables[kind.rotary],
        )

    def _pack(self, fused: FusedParts) -> Linear:
        return self._kernels.pack_linear(*self._load_fused(fused))

    def _load_fused(self, fused: FusedParts) -> tuple[Tensor, Tensor | None]:
        weight = self._checkpoint.load(fused.weights, WHOLE, self._kernels.dtype)
        bias = self._checkpoint.load(fused.biases, WHOLE, torch.float32) if fused.biases else None
        return weight, bias

    def _load_norm(self, part: Part) -> Tensor:
        return self._checkpoint.load([part], WHOLE, torch.float32) + self._config.norm_offset

    def _load_optional_norm(self, part: Part | None) -> Tensor | None:
        return None if part is None else self._load_norm(part)


def _prefix_in_use(names: WeightNames, checkpoint: Checkpoint) -> int:
    for place, prefix in enumerate(names.prefixes):
        if any(name.startswith(prefix) for name in checkpoint.names):
            return place
    raise WeightsError(f"no tensor's name begins with {' or '.join(names.prefixes)}")
