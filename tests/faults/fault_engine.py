"""An engine process of hash values whose KV blocks lie in shared memory, so that they travel between workers.

Started as `headrace.worker.main` is: address and parent as arguments, an `EngineShape` on standard input.
"""

from __future__ import annotations

import os
import sys

import msgspec
import numpy as np
import uvloop

from headrace.protocol.engine_messages import PoolInfo
from headrace.sim.hash_executor import HashExecutor
from headrace.sim.shape import EngineShape
from headrace.worker import serve
from headrace.world import real_world
from headrace.world.launcher import die_with_parent
from headrace.world.shared_memory import SharedMemory

SHAPE = EngineShape(
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_waiting=200,
    num_blocks=400,
    block_size=16,
    step_s=0.01,
    token_s=0.0,
)


def main(address: str, parent: str) -> None:
    die_with_parent(int(parent))
    shape = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineShape)
    engine = shape.build()
    executor = engine.executor
    assert isinstance(executor, HashExecutor)
    memory = SharedMemory(executor.values.nbytes)
    noise = executor.values
    executor.values = np.frombuffer(memory.buffer, dtype=np.uint64).reshape(noise.shape)
    executor.values[:] = noise
    info = msgspec.structs.replace(shape.info(engine), pid=os.getpid())
    pool = PoolInfo(memory.path, memory.nbytes, executor.block_bytes, shape.block_size)
    uvloop.run(serve(real_world(), address, engine, info, pool))


if __name__ == "__main__":
    main(*sys.argv[1:])
