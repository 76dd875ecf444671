"""Workers as a gateway knows them, without workers: for tests of what is decided about them."""

from __future__ import annotations

from typing import Any, cast

from headrace.cluster.registry import Member
from headrace.engine.identity import BlockHasher
from headrace.protocol.channel import Channel
from headrace.protocol.messages import (
    BlockNames,
    EngineInfo,
    FromWorker,
    Role,
    StepStats,
    WorkerInfo,
)

KEY = b"key"
BLOCK_SIZE = 4


def engine_info(**fields: Any) -> EngineInfo:
    sizes: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "max_waiting": 100,
        "num_blocks": 1000,
        "block_size": BLOCK_SIZE,
        "prefix_caching": True,
        **fields,
    }
    return EngineInfo(
        model="m",
        revision="r",
        numerics="n",
        dtype="bfloat16",
        batch_invariant=True,
        max_model_len=10_000,
        vocab_size=50_000,
        block_bytes=10,
        weight_bytes=10,
        kv_layout="l",
        threads=1,
        pid=1,
        **sizes,
    )


def step_stats(**fields: Any) -> StepStats:
    numbers: dict[str, Any] = dict.fromkeys(
        (
            *("step", "tokens", "sampled", "rows", "step_s", "kernel_s", "running", "waiting"),
            *("blocks_free", "blocks_cached", "blocks_held", "blocks_leased", "blocks_quarantined"),
            *("held_tokens", "preemptions", "prefix_queries", "prefix_hits", "evictions"),
        ),
        0,
    )
    return StepStats(**{**numbers, **fields})


def member(
    name: str,
    role: Role = Role.BOTH,
    *,
    queued: int = 0,
    open_samples: int = 0,
    tells: bool = True,
    **engine: Any,
) -> Member:
    """One that is up. `tells`: it names its blocks by the cluster's key."""
    size = engine.get("block_size", BLOCK_SIZE)
    hasher = BlockHasher(KEY if tells else b"another", b"fp", size)
    info = engine_info(block_names=BlockNames(b"fp", 0, hasher.key_check), **engine)
    worker = WorkerInfo(worker_id=name, generation=1, role=role, data_address="d:1", engine=info)
    made = Member(worker, cast(Channel[FromWorker], None), heard_s=0.0)
    made.told(step_stats(queued_tokens=queued), 0.0)
    made.open_samples = open_samples
    return made
