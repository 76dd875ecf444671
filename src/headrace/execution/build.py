"""From `EngineOptions` to an engine that can step: every "auto" is decided here, and said in words.

Order: precision and kernels, how long a sequence may be, weights, how many KV blocks fit and in what memory,
a self-test where batch invariance was promised, and the scheduler over it all.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace import __version__
from headrace.config.engine import EngineOptions
from headrace.engine import Engine, GroupSpec, KVCache, Scheduler, SchedulerConfig
from headrace.execution.runner import TorchExecutor
from headrace.execution.selftest import check_batch_invariance
from headrace.kernels import Kernels
from headrace.kernels.choose import choose_kernels
from headrace.models.config import DynamicRotary, ModelConfig
from headrace.models.families import read_config
from headrace.models.kv_groups import KVGroup, kv_groups
from headrace.models.loader import load_decoder
from headrace.protocol.messages import EngineInfo
from headrace.store import ModelFiles, open_model
from headrace.world.shared_memory import SharedMemory, SharedMemoryError


class EngineBuildError(ValueError):
    """The options cannot be met on this machine; the text says which, the limit, and what to do."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine ready to step, what is said of it, and the memory of its KV pool where that is shared.

    Block i, all layers of its group, is the bytes [i * n, (i + 1) * n) of `shared_kv`, with n
    `info.block_bytes`, for i below `info.num_blocks`; nothing else is in it. `engine.executor.close` lets go
    of it.
    """

    engine: Engine
    info: EngineInfo
    shared_kv: SharedMemory | None


@dataclass(frozen=True, slots=True)
class _Pool:
    """How the KV cache is cut. Sizes in bytes, lengths in tokens."""

    groups: tuple[KVGroup, ...]
    num_blocks: int
    block_bytes: int
    max_model_len: int


def build_engine(options: EngineOptions) -> BuiltEngine:
    """Load a model and make it ready to step.

    Raises EngineBuildError for options this machine or model cannot meet, and what `store` and `models` raise
    for files that are broken.
    """
    files = open_model(Path(options.directory))
    torch.set_num_threads(options.threads)
    kernels, said = _kernels(options)
    notes = [said]
    pool = _cut_pool(options, files, kernels, notes)
    decoder = load_decoder(files.directory, kernels, pool.max_model_len)
    config = decoder.config
    shared_kv = _share(pool) if options.shared_kv else None
    pages = kernels.allocate_kv(
        pool.num_blocks,
        len(pool.groups[0].layers),
        config.kv_heads,
        config.head_dim,
        options.block_size,
        None if shared_kv is None else torch.frombuffer(shared_kv.buffer, dtype=torch.uint8),
    )
    decoder.attach_kv(pages, pool.groups, options.block_size)
    if options.batch_invariant:
        check_batch_invariance(
            decoder,
            groups=len(pool.groups),
            num_blocks=pool.num_blocks,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
        )
        notes.append("batch-invariant: the same bits whatever runs beside, tested on the loaded weights")

    numerics = f"{kernels.numerics}/torch-{torch.__version__}/{_name(kernels.dtype)}"
    eos_token_ids = frozenset(files.eos_token_ids)
    scheduler = Scheduler(
        SchedulerConfig(
            max_model_len=pool.max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=eos_token_ids,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_waiting=options.max_waiting,
            reuse_prefix=options.prefix_caching,
            steps_in_flight=TorchExecutor.depth,
        ),
        KVCache(
            num_blocks=pool.num_blocks,
            block_size=options.block_size,
            groups=[GroupSpec(group.window) for group in pool.groups],
            fingerprint=_fingerprint(files.revision, numerics, kernels, config, pool, options.block_size),
            key=options.cache_key or os.urandom(32),
        ),
    )
    executor = TorchExecutor(
        decoder,
        rows=options.max_num_seqs,
        groups=len(pool.groups),
        max_model_len=pool.max_model_len,
        block_size=options.block_size,
        eos_token_ids=eos_token_ids,
        memory=shared_kv,
    )
    info = EngineInfo(
        model=options.served_name,
        revision=files.revision,
        numerics=numerics,
        dtype=_name(kernels.dtype),
        batch_invariant=options.batch_invariant,
        max_model_len=pool.max_model_len,
        vocab_size=config.vocab_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_waiting=options.max_waiting,
        block_size=options.block_size,
        num_blocks=pool.num_blocks,
        block_bytes=pool.block_bytes,
        weight_bytes=sum(math.prod(entry.shape) for entry in files.tensors.values()) * kernels.dtype.itemsize,
        prefix_caching=options.prefix_caching,
        block_names=scheduler.cache.block_names if options.cache_key else None,
        kv_layout=f"{kernels.numerics}, {_name(kernels.dtype)}, {pool.block_bytes} bytes a block",
        threads=options.threads,
        pid=os.getpid(),
        notes=tuple(notes),
    )
    return BuiltEngine(Engine(scheduler, executor), info, shared_kv)


def check_cache(options: EngineOptions) -> None:
    """Raise what `build_engine` would for lengths and KV cache, without reading a weight."""
    kernels, _ = _kernels(options)
    _cut_pool(options, open_model(Path(options.directory)), kernels, [])


def _kernels(options: EngineOptions) -> tuple[Kernels, str]:
    return choose_kernels(
        options.kernels,
        dtype=options.dtype,
        quantization=options.quantization,
        batch_invariant=options.batch_invariant,
        threads=options.threads,
    )


def _fingerprint(
    revision: str, numerics: str, kernels: Kernels, config: ModelConfig, pool: _Pool, block_size: int
) -> bytes:
    """Names all that shapes content and layout of a block of given tokens, and nothing else: engines of one
    fingerprint can use each other's blocks, however many they have and whatever lengths they allow.

    That length counts where rotary frequencies are chosen by it. Another release may lay out pages otherwise.
    """
    rotary_lengths = {
        max(kind.rotary.original_max_positions, pool.max_model_len)
        for kind in config.layer_kinds
        if isinstance(kind.rotary, DynamicRotary)
    }
    parts = (
        __version__,
        revision,
        numerics,
        kernels.batch_invariant,
        block_size,
        pool.block_bytes,
        sorted(rotary_lengths),
    )
    return repr(parts).encode()


def _share(pool: _Pool) -> SharedMemory:
    try:
        return SharedMemory(pool.num_blocks * pool.block_bytes)
    except SharedMemoryError as error:
        raise EngineBuildError(f"shared_kv: {error}") from error


def _cut_pool(options: EngineOptions, files: ModelFiles, kernels: Kernels, notes: list[str]) -> _Pool:
    """How many blocks the memory gives, and so how long a sequence may be."""
    config = read_config(dict(files.config))
    groups = kv_groups(config)
    size = options.block_size
    layers = len(groups[0].layers)
    block_bytes = kernels.allocate_kv(1, layers, config.kv_heads, config.head_dim, size).nbytes
    most = config.max_positions
    if options.max_model_len is not None and options.max_model_len > most:
        raise EngineBuildError(
            f"max_model_len is {options.max_model_len}; the model's positions reach to {most}"
        )
    wanted = options.max_model_len or most

    sequences = options.max_num_seqs * _blocks_for(groups, wanted, size, options.max_num_batched_tokens)
    num_blocks = min(options.kv_cache_memory // block_bytes, sequences)
    length = wanted
    while length > 0 and _blocks_for(groups, length, size, options.max_num_batched_tokens) > num_blocks:
        length -= size
    if length < wanted and options.max_model_len is not None:
        needed = _blocks_for(groups, wanted, size, options.max_num_batched_tokens) * block_bytes
        raise EngineBuildError(
            f"one sequence of max_model_len {wanted} needs {needed} bytes of KV cache and kv_cache_memory is "
            f"{options.kv_cache_memory}; raise it or lower max_model_len"
        )
    if length < 2:
        raise EngineBuildError(
            f"kv_cache_memory of {options.kv_cache_memory} bytes holds {num_blocks} blocks of {block_bytes} "
            "bytes, too few for a single sequence; raise it"
        )
    if length < wanted:
        notes.append(f"max_model_len {length} of the model's {most}: more does not fit into the KV cache")
    tokens = num_blocks // len(groups) * size
    size_mib = num_blocks * block_bytes / 2**20
    notes.append(f"KV cache for {tokens} tokens: {num_blocks} blocks, {size_mib:.0f} MiB")
    return _Pool(groups, num_blocks, block_bytes, length)


def _blocks_for(groups: tuple[KVGroup, ...], length: int, size: int, budget: int) -> int:
    """The most blocks that one sequence of `length` tokens holds."""
    cache = KVCache(num_blocks=1, block_size=size, groups=[GroupSpec(group.window) for group in groups])
    return cache.peak_blocks(length, budget)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
