"""A built engine: its KV pool in memory of its own or shared, and which engines' blocks are the same."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from headrace.config import EngineOptions
from headrace.execution.build import BuiltEngine, EngineBuildError, build_engine
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.world.shared_memory import SharedMemoryError, open_shared_memory

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of two tiny layers."""
    shapes = {"model.embed_tokens": (64, 32), "model.norm": (32,), "lm_head": (64, 32)}
    for layer in range(2):
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def build(directory: Path, **options: Any) -> BuiltEngine:
    defaults = {"dtype": "float32", "threads": 1, "max_model_len": 64, "kv_cache_memory": 1 << 18}
    named = {"directory": str(directory), "served_name": "m"}
    return build_engine(EngineOptions(**{**named, **defaults, **options}))


def answer(built: BuiltEngine) -> list[int]:
    async def run() -> list[int]:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        built.engine.add(GenerateRequest(request_id="r", prompt=list(range(40)), sampling=sampling))
        tokens = []
        while built.engine.has_work:
            tokens += [token for output in await built.engine.step() for token in output.tokens]
        return tokens

    return asyncio.run(run())


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_shared_pool_is_read_from_outside_and_changes_no_token(directory: Path, kernels: str) -> None:
    own, shared = (build(directory, kernels=kernels, shared_kv=shared) for shared in (False, True))
    assert own.shared_kv is None and shared.shared_kv is not None
    size = shared.info.num_blocks * shared.info.block_bytes
    assert shared.shared_kv.nbytes == size
    pool = open_shared_memory(shared.shared_kv.path, size)
    assert not any(pool.buffer)
    assert answer(shared) == answer(own) and len(answer(own)) == 8
    block = shared.info.block_bytes
    used = [i for i in range(shared.info.num_blocks) if any(pool.buffer[i * block : (i + 1) * block])]
    assert len(used) == 3  # 47 positions in blocks of 16
    pool.close()
    path = shared.shared_kv.path
    shared.engine.executor.close()
    own.engine.executor.close()
    with pytest.raises(SharedMemoryError):
        open_shared_memory(path, size)


def test_a_system_that_cannot_share_refuses_to_build(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(EngineBuildError, match=r"shared_kv: .*memfd_create"):
        build(directory, shared_kv=True)


def test_engines_of_one_key_name_equal_blocks_alike(directory: Path) -> None:
    """What shapes a block's content or layout parts names; what does not, does not."""

    def name(**options: Any) -> bytes:
        built = build(directory, **{"cache_key": b"k", "kernels": "native", **options})
        return built.engine.scheduler.cache.root("tenant")

    same = name()
    for harmless in (
        {"max_model_len": 128},
        {"threads": 2},
        {"kv_cache_memory": 1 << 19},
        {"max_num_seqs": 3, "max_num_batched_tokens": 64},
        {"shared_kv": True},
        {"served_name": "another"},
    ):
        assert name(**harmless) == same, harmless
    reference = {"kernels": "reference"}
    others = (
        {"cache_key": b"other"},
        {"cache_key": b""},
        {"cache_key": b""},  # a random key each time
        {"dtype": "bfloat16"},
        {"block_size": 12},  # of as many bytes as 16
        reference,
        reference | {"batch_invariant": True},
    )
    assert len({same, *(name(**other) for other in others)}) == 1 + len(others)


def test_a_length_that_chooses_rotary_frequencies_parts_names(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | DYNAMIC))

    def name(length: int) -> bytes:
        return build(directory, cache_key=b"k", max_model_len=length).engine.scheduler.cache.root("")

    assert name(48) == name(64)  # nothing is stretched up to the original length
    assert len({name(64), name(96), name(128)}) == 3


def test_the_cache_key_is_bounded_and_not_printed() -> None:
    options = EngineOptions(directory="d", served_name="m", cache_key=b"secret")
    assert "secret" not in repr(options) and "secret" not in str(options.__rich_repr__())
    assert "served_name='m', dtype='auto'" in repr(options)
    assert msgspec.json.decode(msgspec.json.encode(options), type=EngineOptions) == options
    with pytest.raises(ValueError, match="at most 64 bytes, got 65"):
        EngineOptions(directory="d", served_name="m", cache_key=bytes(65))
