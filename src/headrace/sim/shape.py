"""What the engines of a simulated cluster are like: their limits, what steps take, what they compute.

In: numbers. Out: engines on a `HashExecutor`, what they say of themselves, and what a request produces on one
when nothing disturbs it. It must not know workers or clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.engine import Engine, SchedulerConfig
from headrace.protocol.messages import EngineInfo
from headrace.protocol.requests import GenerateRequest
from headrace.sim.hash_executor import SimExecutor, hash_engine
from headrace.sim.hash_model import Expected, HashModel, expected

KEY = b"the cluster's key"
"""Of the names of all blocks in a simulation."""


@dataclass(frozen=True)
class EngineShape:
    """What each engine is like. Times in seconds of virtual time."""

    max_model_len: int = 256
    vocab_size: int = 1000
    eos_token_ids: frozenset[int] = frozenset({7})
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 32
    max_waiting: int = 100
    num_blocks: int = 80
    block_size: int = 4
    step_s: float = 0.004
    token_s: float = 0.0005

    def build(self) -> Engine:
        config = SchedulerConfig(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
        )
        return hash_engine(
            config,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            step_s=self.step_s,
            token_s=self.token_s,
            key=KEY,
        )

    def info(self, engine: Engine) -> EngineInfo:
        """What an engine of this shape says of itself."""
        block_bytes = executor_of(engine).block_bytes
        return EngineInfo(
            model="hash",
            revision="0",
            numerics="exact",
            dtype="uint64",
            batch_invariant=True,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            block_bytes=block_bytes,
            weight_bytes=0,
            prefix_caching=True,
            block_names=engine.scheduler.cache.block_names,
            kv_layout=f"hash values, {block_bytes} bytes a block",
            threads=1,
            pid=1,
        )

    def expected(self, request: GenerateRequest, index: int) -> Expected:
        """What a sample produces when nothing disturbs it."""
        model = HashModel(self.vocab_size, self.eos_token_ids)
        return expected(request, index, model, self.max_model_len)

    def holds(self, blocks: memoryview, request: GenerateRequest, tokens: int) -> bool:
        """Whether these blocks hold the first so many positions of a request, which are all of its prompt."""
        values = self.expected(request, 0).values[0]
        held: list[int] = np.frombuffer(blocks, np.uint64)[:tokens].tolist()
        return held == values[:tokens]


def executor_of(engine: Engine) -> SimExecutor:
    """The executor of an engine in a simulation."""
    if not isinstance(engine.executor, SimExecutor):
        raise TypeError(f"{type(engine.executor).__name__} takes no virtual time")
    return engine.executor
