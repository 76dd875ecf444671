"""From a GGUF file's tensors to the safetensors files that the model was published with.

Undoes what the conversion to GGUF did: names, the interleaving of rotary halves in Llama's query and key
rows, and the one that is added to Gemma's norm weights. Quantised tensors become float32, which holds every
value of every format exactly; F32, F16 and BF16 stay as they are. Works in chunks of rows, so memory does not
grow with the model.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import dequantize

from .errors import ModelFileError, UnsupportedModelError
from .gguf_config import ModelShape, shape_of
from .gguf_file import GGUFFile, GGUFTensor
from .safetensors_file import TensorSpec, write_safetensors

MAX_SHARD_BYTES: Final = 5_000_000_000
CHUNK_VALUES: Final = 4 << 20
"""Values dequantised at a time: 16 MB of float32, and a few times that while it happens."""

KEPT: Final = {Q.F32: "F32", Q.F16: "F16", Q.BF16: "BF16"}
DEQUANTISED: Final = frozenset({Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q4_K, Q.Q5_K, Q.Q6_K})

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS: Final = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "qwen2": {"ffn_norm": "post_attention_layernorm"},
    "qwen3": {
        "ffn_norm": "post_attention_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
}
_NOT_WEIGHTS: Final = frozenset({"rope_freqs.weight"})
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PLAIN = re.compile(r"(\w+)\.(weight|bias)")


def tensor_names(file: GGUFFile) -> dict[str, str]:
    """GGUF name to published name, in the file's order. Raises for a tensor that has no place in the
    architecture and for one that is missing."""
    shape = shape_of(file)
    names = {name: _published_name(file, shape, name) for name in file.tensors if name not in _NOT_WEIGHTS}
    needed = ["token_embd.weight", "output_norm.weight"] + [
        f"blk.{layer}.{part}.weight"
        for layer in range(shape.layers)
        for part in (*_LAYER, *_NORMS[shape.architecture])
    ]
    missing = [name for name in needed if name not in names]
    if missing:
        shown = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise ModelFileError(
            f"{file.path} lacks {len(missing)} tensors of its {shape.layers} layers: {shown}"
        )
    return names


def converted_bytes(file: GGUFFile) -> int:
    """Size of the safetensors files that `write_weights` makes, without their headers."""
    return sum(spec.nbytes for spec in _specs(file))


def write_weights(file: GGUFFile, directory: Path, wrote: Callable[[int], None]) -> list[Path]:
    """Write the model's tensors to `directory`. `wrote` hears the size in bytes of each chunk."""
    return write_safetensors(directory, _specs(file), max_shard_bytes=MAX_SHARD_BYTES, wrote=wrote)


def _specs(file: GGUFFile) -> list[TensorSpec]:
    shape = shape_of(file)
    return [
        _spec(file, shape, file.tensors[name], published) for name, published in tensor_names(file).items()
    ]


def _published_name(file: GGUFFile, shape: ModelShape, name: str) -> str:
    if match := _BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        known = _LAYER | _NORMS[shape.architecture]
        if part in known and int(layer) < shape.layers:
            return f"model.layers.{layer}.{known[part]}.{kind}"
    elif (match := _PLAIN.fullmatch(name)) and match[1] in _OUTER:
        return f"{_OUTER[match[1]]}.{match[2]}"
    raise UnsupportedModelError(
        f"{file.path}: tensor {name!r} has no place in a {shape.architecture} model of {shape.layers} layers"
    )


def _spec(file: GGUFFile, shape: ModelShape, tensor: GGUFTensor, published: str) -> TensorSpec:
    kind = tensor.quantization
    if kind not in KEPT and kind not in DEQUANTISED:
        read = ", ".join(sorted(q.name for q in (*KEPT, *DEQUANTISED)))
        raise UnsupportedModelError(
            f"{file.path}: tensor {tensor.name!r} is in format {kind.name}; read are {read}"
        )
    offset_norm = shape.architecture == "gemma3" and published.endswith("norm.weight")
    dtype = "F32" if offset_norm else KEPT.get(kind, "F32")
    order = _row_order(file, shape, tensor)

    def chunks() -> Iterator[memoryview]:
        rows = file.rows(tensor.name)
        if order is not None:
            rows = rows.reshape(tensor.shape[0], -1)
        step = max(1, CHUNK_VALUES * rows.shape[0] // math.prod(tensor.shape))
        for begin in range(0, rows.shape[0], step):
            part = rows[begin : begin + step] if order is None else rows[order[begin : begin + step]]
            if kind in KEPT and not offset_norm:
                yield np.ascontiguousarray(part).data.cast("B")
                continue
            values = _dequantised(part, kind)
            if offset_norm:
                values = values - np.float32(1)
            yield np.ascontiguousarray(values).data.cast("B")

    return TensorSpec(published, dtype, tensor.shape, chunks)


def _dequantised(rows: npt.NDArray[np.uint8], kind: Q) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = dequantize(np.ascontiguousarray(rows), kind)
    return values


def _row_order(file: GGUFFile, shape: ModelShape, tensor: GGUFTensor) -> npt.NDArray[np.intp] | None:
    """Which rows of a Llama query or key matrix come where.

    GGUF pairs the rotary halves of a head row by row (0, d/2, 1, d/2 + 1, …); published files keep the halves
    apart.
    """
    match = _BLOCK.fullmatch(tensor.name)
    if shape.architecture != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = shape.heads if match[2] == "attn_q" else shape.kv_heads
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise ModelFileError(f"{file.path}: tensor {tensor.name!r} has {rows} rows for {heads} heads")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()
