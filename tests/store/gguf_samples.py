"""Small GGUF files of every architecture and number format that is read, with random content."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, quantize
from gguf.constants import GGML_QUANT_SIZES

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "th", "the", "Ġthe"]
END = "<|im_end|>"
MERGES = ["t h", "th e", "Ġ the"]

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: Q = Q.F32) -> npt.NDArray[Any]:
    """Values of a weight in format `kind`, as the bytes that a file holds."""
    if kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K):
        return random_k_blocks(rng, shape, kind)
    values = rng.normal(0, 0.05, shape).astype(np.float32)
    return values if kind == Q.F32 else quantize(values, kind)


def random_k_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: Q) -> npt.NDArray[np.uint8]:
    """Blocks of random bits under sane scales: the package can read these formats but not write them."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    scales = rng.normal(0, 0.01, (*shape[:-1], shape[-1] // block, 2)).astype(np.float16)
    if kind == Q.Q6_K:  # the scale is the last field, in the others two come first
        blocks[..., -2:] = scales[..., :1].view(np.uint8)
    else:
        blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def norm_names(architecture: str) -> list[str]:
    if architecture == "gemma3":
        return ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"]
    return ["attn_norm", "ffn_norm", *(["attn_q_norm", "attn_k_norm"] if architecture == "qwen3" else [])]


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kind: Q = Q.F32,
    *,
    tied: bool = True,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, npt.NDArray[Any]] | None = None,
    leave_out: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """Write a model of two layers. `metadata` goes on top of the architecture's own keys."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    write_metadata(writer, architecture, metadata or {})
    matrices = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    tensors: dict[str, tuple[npt.NDArray[Any], Q]] = {
        "token_embd.weight": (random_tensor(rng, (len(WORDS) + 1, HIDDEN), kind), kind),
        "output_norm.weight": (1 + random_tensor(rng, (HIDDEN,)), Q.F32),
    }
    if not tied:
        tensors["output.weight"] = (random_tensor(rng, (len(WORDS) + 1, HIDDEN), kind), kind)
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            tensors[f"blk.{layer}.{name}.weight"] = (random_tensor(rng, shape, kind), kind)
        for name in norm_names(architecture):
            size = HEAD_DIM if name in ("attn_q_norm", "attn_k_norm") else HIDDEN
            tensors[f"blk.{layer}.{name}.weight"] = (1 + random_tensor(rng, (size,)), Q.F32)
        if architecture == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = (random_tensor(rng, matrices[name][:1]), Q.F32)
    tensors |= {name: (values, Q.F32) for name, values in (extra or {}).items()}
    for name, (values, stored_as) in tensors.items():
        if name not in leave_out:
            writer.add_tensor(name, values, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(writer: GGUFWriter, architecture: str, changes: dict[str, Any]) -> None:
    keys: dict[str, Any] = {
        "general.name": "Random",
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 1024,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": FEED_FORWARD,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.attention.key_length": HEAD_DIM,
        f"{architecture}.rope.freq_base": 50_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*WORDS, END],
        "tokenizer.ggml.token_type": [1] * len(WORDS) + [3],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": len(WORDS),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    if architecture == "gemma3":
        keys["gemma3.attention.sliding_window"] = 64
    for key, value in (keys | changes).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
