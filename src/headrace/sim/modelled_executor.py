"""An executor that computes nothing: a step takes as long as a cost model says and brings any tokens.

In: plans. Out: for each row that samples, a token that depends on its seed and position alone, when the
modelled time has passed. Scheduler, block pool and prefix cache above it are the real ones. A block is one
byte of memory: where blocks travel, the network charges what they stand for (`sim/planning.py`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from headrace.engine import Engine, KVCache, Scheduler, SchedulerConfig
from headrace.engine.plan import StepPlan, StepResult
from headrace.protocol.messages import EngineInfo
from headrace.protocol.requests import GenerateRequest, sample_seed
from headrace.sim.cost import Row, StepCost
from headrace.sim.hash_executor import SimExecutor
from headrace.sim.hash_model import Expected
from headrace.sim.ideal_cache import IdealCache
from headrace.sim.shape import KEY, EngineShape


def modelled_token(seed: int, position: int, vocab_size: int) -> int:
    """What is sampled for this position of a sequence."""
    return (seed + position) % vocab_size


@dataclass(slots=True)
class _Row:
    """State that outlives a step."""

    seed: int
    answer: int
    """The position of the first token that is not of the prompt."""
    end: int
    """Where it ends at the latest."""
    done: int = 0
    """Positions that were computed, those included that the scheduler does not know of yet."""


class ModelledExecutor(SimExecutor):
    """Runs one step at a time, in the time of `cost`. `step_s` seconds more are added to each step.

    With a `stride` above 1, a step in which all rows decode stands for so many of them: each row brings as
    many tokens at once, after the time of all these steps, as if drafts had been accepted. What comes in
    meanwhile waits until their end.
    """

    depth = 1
    step_s = 0.0
    token_s = 0.0

    def __init__(self, cost: StepCost, vocab_size: int, num_blocks: int, stride: int = 1) -> None:
        self.cost = cost
        self.steps = 0
        """Of the hardware: a step that stands for several counts as these."""
        self.tokens = 0
        """Positions that were computed."""
        self.busy_s = 0.0
        """Virtual seconds that steps have taken."""
        self._stride = stride
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._memory = bytearray(num_blocks)
        self._step: asyncio.Future[StepResult] | None = None

    @property
    def block_bytes(self) -> int:
        return 1

    def memory(self) -> memoryview:
        return memoryview(self._memory)

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        states = self._rows
        for start in plan.starts:
            answer = start.prompt_length
            states[start.row] = _Row(start.seed, answer, answer + start.sampling.max_tokens)
        work: list[Row] = []
        stride = self._stride
        for row in plan.rows:
            state, end = states[row.row], row.start + row.count
            done = state.done if state.done > row.start else row.start
            if end > done:
                work.append((end - done, done))
            state.done = end
            if stride > 1 and (end - done != 1 or end <= state.answer):
                stride = 1  # a prompt, or the first token after one: others must not wait for more than this
        tokens = []
        vocab_size = self._vocab_size
        for row in plan.rows:
            end = row.start + row.count
            state = states[row.row]
            more = min(stride, state.end - end) if row.sample else 0
            # As `modelled_token`, without a call for each of millions.
            tokens.append([(state.seed + p) % vocab_size for p in range(end, end + more)])
            if more > 1:
                state.done += more - 1
        seconds = self._run(work, tokens)
        loop = asyncio.get_running_loop()
        self._step = loop.create_future()
        result = StepResult(tokens, kernel_s=seconds)
        loop.call_at(loop.time() + seconds, self._deliver, self._step, result)
        return self._step

    def _run(self, work: list[Row], tokens: list[list[int]]) -> float:
        """How long these rows take, the further tokens of each included."""
        seconds = self.cost.seconds(work) + (self.step_s if work else 0.0)
        self.steps += 1
        self.tokens += sum(new for new, _ in work)
        for later in range(1, max(map(len, tokens))):  # then all rows have work
            rows = [
                (1, context + later)
                for (_, context), brought in zip(work, tokens, strict=True)
                if len(brought) > later
            ]
            seconds += self.cost.seconds(rows) + self.step_s
            self.steps += 1
            self.tokens += len(rows)
        self.busy_s += seconds
        return seconds

    @staticmethod
    def _deliver(step: asyncio.Future[StepResult], result: StepResult) -> None:
        if not step.done():
            step.set_result(result)

    def close(self) -> None:
        """A step still in flight, which there should not be, is cancelled."""
        if self._step is not None:
            self._step.cancel()


@dataclass(frozen=True, kw_only=True)
class ModelledShape(EngineShape):
    """Engines of a cluster that is planned. The limits are those of `EngineShape`."""

    cost: StepCost
    stride: int = 1
    """Decode steps that are run as one; see `ModelledExecutor`."""
    ideal: IdealCache | None = None
    """Of the cluster, where its engines have one together; None: each has its own."""
    reuse_prefix: bool = True
    """Whether prompts share what they begin with."""
    eos_token_ids: frozenset[int] = frozenset()
    step_s: float = 0.0
    token_s: float = 0.0

    @property
    def kv_block_bytes(self) -> float:
        """What one block stands for, in bytes of the modelled memory, all devices of a worker together."""
        return self.cost.shape.kv_bytes * self.block_size

    def build(self) -> Engine:
        config = SchedulerConfig(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            reuse_prefix=self.reuse_prefix,
        )
        cache = KVCache(num_blocks=self.num_blocks, block_size=self.block_size, key=KEY)
        if self.ideal is not None:
            cache.pool = self.ideal.pool(self.num_blocks)
        executor = ModelledExecutor(self.cost, self.vocab_size, self.num_blocks, self.stride)
        return Engine(Scheduler(config, cache), executor)

    def info(self, engine: Engine) -> EngineInfo:
        model = self.cost.shape
        weights = (model.layer_weights + 2 * model.head_weights) * model.weight_bytes_each
        return msgspec.structs.replace(
            super().info(engine),
            model=model.name,
            numerics="modelled",
            dtype="modelled",
            prefix_caching=self.reuse_prefix,
            block_bytes=round(self.kv_block_bytes),
            weight_bytes=round(weights),
            kv_layout=f"{model.name}, {self.block_size} positions a block",
        )

    def expected(self, request: GenerateRequest, index: int) -> Expected:
        begin = len(request.prompt)
        end = min(begin + request.sampling.max_tokens, self.max_model_len)
        seed = sample_seed(request.sampling.seed, index)
        tokens = [modelled_token(seed, position, self.vocab_size) for position in range(begin, end)]
        return Expected(tokens, None, None, [])
