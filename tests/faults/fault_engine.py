"""An engine process of hash values whose KV blocks lie in shared memory, so that they travel between workers.

Started as `headrace.worker.main` is: address and parent as arguments, `Shape` on standard input.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import msgspec
import numpy as np
import uvloop

from headrace.engine import SchedulerConfig
from headrace.protocol.engine_messages import PoolInfo
from headrace.protocol.messages import EngineInfo
from headrace.sim.hash_executor import HashExecutor, hash_engine
from headrace.worker import serve
from headrace.world import real_world
from headrace.world.launcher import die_with_parent
from headrace.world.shared_memory import SharedMemory

BLOCK_SIZE = 16
_KEY = b"the cluster's key"


@dataclass(frozen=True)
class Shape:
    """What each engine is like. Times in seconds."""

    max_model_len: int = 512
    vocab_size: int = 1000
    eos_token_ids: frozenset[int] = frozenset({7})
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_waiting: int = 200
    num_blocks: int = 400
    step_s: float = 0.01


def main(address: str, parent: str) -> None:
    die_with_parent(int(parent))
    shape = msgspec.json.decode(sys.stdin.buffer.read(), type=Shape)
    config = SchedulerConfig(
        max_model_len=shape.max_model_len,
        vocab_size=shape.vocab_size,
        eos_token_ids=shape.eos_token_ids,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        max_waiting=shape.max_waiting,
    )
    engine = hash_engine(
        config, num_blocks=shape.num_blocks, block_size=BLOCK_SIZE, step_s=shape.step_s, key=_KEY
    )
    executor = engine.executor
    assert isinstance(executor, HashExecutor)
    memory = SharedMemory(executor.values.nbytes)
    noise = executor.values
    executor.values = np.frombuffer(memory.buffer, dtype=np.uint64).reshape(noise.shape)
    executor.values[:] = noise
    info = EngineInfo(
        model="hash",
        revision="0",
        numerics="exact",
        dtype="uint64",
        batch_invariant=True,
        max_model_len=shape.max_model_len,
        vocab_size=shape.vocab_size,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        max_waiting=shape.max_waiting,
        block_size=BLOCK_SIZE,
        num_blocks=shape.num_blocks,
        block_bytes=executor.block_bytes,
        weight_bytes=0,
        prefix_caching=True,
        kv_layout="hash",
        threads=1,
        pid=os.getpid(),
    )
    pool = PoolInfo(memory.path, memory.nbytes, executor.block_bytes, BLOCK_SIZE)
    uvloop.run(serve(real_world(), address, engine, info, pool))


if __name__ == "__main__":
    main(*sys.argv[1:])
