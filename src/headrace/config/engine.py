"""What one engine is asked to be: the options that travel from the command line to the engine's process.

The one place where their defaults live. "auto" and None are decided by the engine when it knows model and
machine; what it decided comes back in `EngineInfo`.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec

Dtype = Literal["auto", "bfloat16", "float32"]
Quantization = Literal["none", "int8"]
KernelLibrary = Literal["auto", "native", "reference"]
Connector = Literal["auto", "tcp", "nixl"]
"""How KV blocks move between workers. `auto`: over NIXL where both have it and reach each other, else TCP.
`nixl`: the same, and a worker that cannot have NIXL does not start."""


MAX_CACHE_KEY_BYTES = 64
"""What BLAKE2b takes as a key."""

CACHE_KEY_BYTES = 32
"""Of a key that is drawn at random."""

MOST_REQUESTS = 1_000_000
MOST_TOKENS = 100_000_000
"""Limits against slips of the pen, far above what anybody has: a number beyond fits no message, or means that
nothing is ever reached."""

DEFAULT_STEP_TIMEOUT_S = 60.0
"""How long a step may take: far longer than any does that computes."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine. Lengths in tokens, memory in bytes. ValueError names the option and its limit."""

    directory: str
    """The model's directory in Hugging Face layout, as `store.resolve` found it."""
    served_name: str
    dtype: Dtype = "auto"
    """Of weights, activations and KV cache; auto is bfloat16 where the processor computes in it."""
    quantization: Quantization = "none"
    """Of the weights of linear layers; int8 is half the bytes of bfloat16 at a loss docs/cpu.md states."""
    threads: int = msgspec.field(default_factory=usable_cores)
    max_model_len: int | None = None
    """Prompt and output together; None is what the model was trained for, or what the KV cache holds."""
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 512
    """Tokens computed in one step; longer prompts are prefilled in chunks."""
    max_waiting: int = 1024
    """Sequences that may wait for their first step; more are refused."""
    kv_cache_memory: int = 1 << 30
    block_size: int = 16
    """Positions of one KV block."""
    prefix_caching: bool = True
    batch_invariant: bool = False
    kernels: KernelLibrary = "auto"
    shared_kv: bool = False
    """KV cache in memory that the worker's supervisor can read, for transfers."""
    cache_key: bytes = b""
    """Of the hashes that name KV blocks: workers of one key can compare them; empty is a random key of the
    engine's own. A secret, not printed: who knows it can test guesses at a block's text against its name."""

    def __post_init__(self) -> None:
        for name in ("threads", "max_num_seqs", "max_num_batched_tokens", "max_waiting", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len must be at least 2, one token of prompt and one of output, "
                f"got {self.max_model_len}"
            )
        if self.kv_cache_memory < 1:
            raise ValueError(f"kv_cache_memory must be at least 1 byte, got {self.kv_cache_memory}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can advance in every step"
            )
        if len(self.cache_key) > MAX_CACHE_KEY_BYTES:
            raise ValueError(
                f"cache_key must be at most {MAX_CACHE_KEY_BYTES} bytes, got {len(self.cache_key)}"
            )

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Every option but the secret one."""
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name != "cache_key"]

    def __repr__(self) -> str:
        return f"EngineOptions({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"
