"""An executor whose KV blocks hold the chain of tokens itself: the sharp tool of proof.

Every position writes a value that depends on all values it can see, read back through the row's block
table in every step; the next token depends on the last position's values (`hash_model`). A tiny
transformer's argmax often survives a wrong key; here one stale, foreign, unwritten or misplaced value
anywhere in the context changes every token that follows, and `expected_tokens` says, without any blocks,
what a request must produce.

What cannot be right whatever the values are (a position behind the window's blocks, a row or a block
handed out while a step in flight still names it) raises `PlanError`.

It runs on any event loop, so the same proof holds in real and in virtual time. No torch.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.engine.cache import GroupSpec, KVCache
from headrace.engine.engine import Engine
from headrace.engine.options import SchedulerConfig
from headrace.engine.plan import Executor, RowStart, ScheduledRow, StepPlan, StepResult
from headrace.engine.scheduler import Scheduler
from headrace.protocol.requests import SamplingParams
from headrace.sim.hash_model import Expected, HashModel, expected, expected_tokens


class PlanError(RuntimeError):
    """A plan that no executor could run: it names a row, a position or a block that it may not."""


@dataclass(slots=True)
class _Row:
    """State that outlives a step. `tokens` may be ahead of what the scheduler has seen."""

    tokens: list[int]
    prompt_length: int
    sampling: SamplingParams
    seed: int
    prompt_logprobs: int | None
    tables: list[list[int]]
    slots: list[NDArray[np.int64]]
    """Per group, where each position of its table lies in the flattened blocks; negative for no block."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    result: StepResult
    future: asyncio.Future[StepResult]
    duration_s: float
    number: int
    rows: frozenset[int]
    blocks: frozenset[int]
    written: frozenset[int]


class SimExecutor(Executor):
    """An executor whose steps take time of the running loop's clock: what a simulated worker runs on."""

    step_s: float
    token_s: float
    steps: int
    """How many plans were submitted."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block."""

    @abstractmethod
    def memory(self) -> memoryview:
        """The bytes of all blocks, to be read and written: block i begins at i * block_bytes."""


class HashExecutor(SimExecutor):
    """Runs plans of a `HashModel` over one array of blocks that all groups share.

    A step takes `step_s + token_s * tokens` seconds of the running loop's clock, one step after another;
    results come in order. With a depth of 1 and no modelled time, `submit` returns a future that is done.
    """

    def __init__(
        self,
        model: HashModel,
        *,
        num_blocks: int,
        block_size: int,
        depth: int = 1,
        step_s: float = 0.0,
        token_s: float = 0.0,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1 step in flight, got {depth}")
        self.model = model
        self.depth = depth
        self.block_size = block_size
        self.step_s = step_s
        self.token_s = token_s
        # [num_blocks, block_size]: what no step has written is noise, never a value that could be right
        self.values = np.random.default_rng(0).integers(
            0, 1 << 64, size=(num_blocks, block_size), dtype=np.uint64
        )
        self.steps = 0
        self._rows: dict[int, _Row] = {}
        self._in_flight: deque[_InFlight] = deque()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: `block_size` values of 8."""
        return self.block_size * self.values.itemsize

    def memory(self) -> memoryview:
        return self.values.reshape(-1).view(np.uint8).data

    @property
    def blocks_being_written(self) -> frozenset[int]:
        """Blocks that a step in flight writes: nobody may read them yet."""
        return frozenset().union(*(step.written for step in self._in_flight))

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Run a plan now and deliver its result when the modelled time has passed.

        Raises PlanError, stating the row and the block, where the plan breaks the executor's contract.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self.steps += 1
        for start in plan.starts:
            self._start(start)
        for row in plan.rows:
            self._append_blocks(row)
        duration_s = self.step_s + self.token_s * plan.tokens
        read: set[int] = set()
        written: set[int] = set()
        result = self._run(plan, duration_s, read, written)
        if self.depth == 1 and duration_s == 0:
            future.set_result(result)
            return future
        rows = frozenset(row.row for row in plan.rows)
        self._in_flight.append(
            _InFlight(
                result, future, duration_s, plan.number, rows, frozenset(read | written), frozenset(written)
            )
        )
        if len(self._in_flight) == 1:
            self._deliver_later()
        return future

    def close(self) -> None:
        """Void all rows. A step still in flight, which there should not be, is cancelled."""
        for step in self._in_flight:
            step.future.cancel()
        self._in_flight.clear()
        self._rows.clear()

    # ---- delivery ------------------------------------------------------------------------------------

    def _deliver_later(self) -> None:
        loop = asyncio.get_running_loop()
        if duration_s := self._in_flight[0].duration_s:
            loop.call_later(duration_s, self._deliver)
        else:
            loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if not self._in_flight:
            return  # closed meanwhile
        step = self._in_flight.popleft()
        if not step.future.done():
            step.future.set_result(step.result)
        if self._in_flight:
            self._deliver_later()

    # ---- the contract --------------------------------------------------------------------------------

    def _start(self, start: RowStart) -> None:
        for step in self._in_flight:
            if start.row in step.rows:
                raise PlanError(f"row {start.row} is given away while step {step.number} still runs it")
            adopted = {block for table in start.tables for block in table}
            if early := adopted & step.written:
                raise PlanError(
                    f"row {start.row} reads blocks {sorted(early)} while step {step.number} still writes them"
                )
        self._rows[start.row] = _Row(
            list(start.tokens),
            start.prompt_length,
            start.sampling,
            start.seed,
            start.prompt_logprobs,
            [list(table) for table in start.tables],
            [self._slots(table) for table in start.tables],
        )

    def _append_blocks(self, row: ScheduledRow) -> None:
        if row.row not in self._rows:
            raise PlanError(f"row {row.row} runs and was never started")
        state = self._rows[row.row]
        for group, blocks in enumerate(row.new_blocks):
            if not blocks:
                continue
            for step in self._in_flight:
                if early := step.blocks.intersection(blocks):
                    raise PlanError(
                        f"row {row.row} is given blocks {sorted(early)} while step {step.number} "
                        "still uses them"
                    )
            state.tables[group].extend(blocks)
            state.slots[group] = np.concatenate([state.slots[group], self._slots(blocks)])

    def _slots(self, blocks: Sequence[int]) -> NDArray[np.int64]:
        """Where the positions of these blocks lie in the flattened blocks: [len(blocks) * block_size]."""
        first = np.asarray(blocks, dtype=np.int64) * self.block_size
        return (first[:, None] + np.arange(self.block_size)).reshape(-1)

    # ---- one step ------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan, duration_s: float, read: set[int], written: set[int]) -> StepResult:
        """Run the rows in order; add the blocks that the step uses to `read` and `written`."""
        result = StepResult(tokens=[], kernel_s=duration_s)
        for i, scheduled in enumerate(plan.rows):
            row = self._rows[scheduled.row]
            start, end = scheduled.start, scheduled.start + scheduled.count
            if scheduled.count < 1 or end > len(row.tokens):
                raise PlanError(
                    f"row {scheduled.row} has {len(row.tokens)} tokens, and positions {start} to {end - 1} "
                    "were asked for"
                )
            columns = [
                self._forward(scheduled, row, number, read, written) for number in range(len(row.tables))
            ]
            values = list(zip(*columns, strict=True))
            if row.prompt_logprobs is not None and start + 1 < row.prompt_length:
                result.prompt_logprobs[i] = [
                    self.model.logprobs(values[p - start], row.tokens[p + 1], row.prompt_logprobs)
                    for p in range(start, min(end, row.prompt_length - 1))
                ]
            if not scheduled.sample:
                result.tokens.append([])
                continue
            if end != len(row.tokens):
                raise PlanError(
                    f"row {scheduled.row} samples after position {end - 1} of {len(row.tokens)} tokens"
                )
            outputs = len(row.tokens) - row.prompt_length
            token = self.model.next_token(values[-1], row.sampling, row.seed, outputs)
            row.tokens.append(token)
            result.tokens.append([token])
            if row.sampling.logprobs is not None:
                result.logprobs[i] = [self.model.logprobs(values[-1], token, row.sampling.logprobs)]
        return result

    def _forward(
        self, scheduled: ScheduledRow, row: _Row, group: int, read: set[int], written: set[int]
    ) -> list[int]:
        """Read a row's context through its table, write the values of its new positions, return them."""
        start, end = scheduled.start, scheduled.start + scheduled.count
        size, table = self.block_size, row.tables[group]
        first = self.model.groups[group].first_visible(start) // size
        blocks = table[first : -(-end // size)]
        if len(blocks) < -(-end // size) - first or -1 in blocks:
            raise PlanError(
                f"row {scheduled.row} needs positions {first * size} to {end - 1} of group {group}, and its "
                f"table is {table} (block_size {size})"
            )
        slots, where = self.values.reshape(-1), row.slots[group]
        context = slots[where[self.model.groups[group].first_visible(start) : start]]
        values = self.model.chain(group, start, row.tokens[start:end], context)
        slots[where[start:end]] = values
        read.update(blocks)
        written.update(table[start // size : -(-end // size)])
        return values


def hash_engine(
    config: SchedulerConfig,
    *,
    num_blocks: int,
    block_size: int = 16,
    groups: Sequence[GroupSpec] = (GroupSpec(),),
    step_s: float = 0.0,
    token_s: float = 0.0,
    key: bytes = b"",
    fingerprint: bytes = b"",
) -> Engine:
    """A whole engine on a `HashExecutor` whose depth is `config.steps_in_flight`.

    Engines of equal `key` and `fingerprint` name equal blocks equally.
    """
    model = HashModel(config.vocab_size, config.eos_token_ids, tuple(groups))
    cache = KVCache(
        num_blocks=num_blocks, block_size=block_size, groups=model.groups, fingerprint=fingerprint, key=key
    )
    executor = HashExecutor(
        model,
        num_blocks=num_blocks,
        block_size=block_size,
        depth=config.steps_in_flight,
        step_s=step_s,
        token_s=token_s,
    )
    return Engine(Scheduler(config, cache), executor)


def model_of(engine: Engine) -> HashModel:
    """The model behind an engine made by `hash_engine`, for `expected_tokens`."""
    if not isinstance(engine.executor, HashExecutor):
        raise TypeError(f"this engine runs on {type(engine.executor).__name__}, not on a HashExecutor")
    return engine.executor.model


__all__ = [
    "Expected",
    "HashExecutor",
    "HashModel",
    "PlanError",
    "SimExecutor",
    "expected",
    "expected_tokens",
    "hash_engine",
    "model_of",
]
