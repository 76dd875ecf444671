"""A scheduler that looks at each of its plans: budget, rows, blocks, tenants, and who goes before whom."""

from __future__ import annotations

import math
from collections.abc import Iterable

from headrace.engine import KVCache, Scheduler, SchedulerConfig, StepPlan
from headrace.engine.intake import NO_PROGRESS
from headrace.engine.sequence import Sequence, State
from headrace.protocol.handoff import Leg
from headrace.protocol.requests import GenerateRequest, Progress


class Violation(AssertionError):
    """A rule that did not hold."""


def hold(rule: str, condition: object, *details: object) -> None:
    if not condition:
        raise Violation(f"{rule}: {', '.join(map(str, details))}")


class WatchedScheduler(Scheduler):
    """Checks every plan as it is made."""

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        super().__init__(config, cache)
        self.tenant_of_block: dict[int, str] = {}
        self.arrival: dict[str, int] = {}
        self.found: dict[tuple[str, int], int] = {}  # what a sample found in the cache when it first started

    def add(
        self,
        request: GenerateRequest,
        progress: Progress = NO_PROGRESS,
        leg: Leg = Leg.WHOLE,
        offload_above: int = 0,
    ) -> None:
        self.arrival[request.request_id] = len(self.arrival)
        super().add(request, progress, leg, offload_above)

    def urgency(self, sequence: Sequence) -> tuple[int, int, int]:
        """Who goes first: the more urgent, then the earlier, then the first sample."""
        request = sequence.request
        return request.priority, self.arrival[request.request_id], sequence.index

    def schedule(self) -> StepPlan | None:
        before = [s for s in self.sequences() if not s.in_flight or s.state is State.RUNNING]
        running_before = {s: self._wants(s) for s in before if s.state is State.RUNNING}
        urgent = min((s.request.priority for s in before if s.state is State.WAITING), default=math.inf)
        plan = super().schedule()
        sequences = list(self.sequences())
        self._check_order(sequences, running_before)
        self._check_progress(sequences, plan)
        self._check_admission(sequences, running_before, plan)
        if plan is not None:
            by_row = {s.row: s for s in sequences if s.row is not None}
            lost = [row for row in plan.rows if row.row not in by_row]
            hold("a row that runs is somebody's", not lost, lost)
            self._check_plan(plan, by_row)
            for row in plan.rows:
                sequence = by_row[row.row]
                yields = (
                    row.count == 1 or sequence.request.priority <= urgent or sequence not in running_before
                )
                hold("a chunk yields to one more urgent that waits", yields, sequence.rank, row)
        return plan

    def _wants(self, sequence: Sequence) -> int:
        """Positions that exist and are not scheduled; the last that a sequence may have is never wanted."""
        last = min(len(sequence.request.prompt) + sequence.params.max_tokens, self.config.max_model_len) - 1
        return min(len(sequence.tokens) + sequence.pending, last) - sequence.scheduled

    def _check_order(self, sequences: list[Sequence], running_before: Iterable[Sequence]) -> None:
        started = [s for s in sequences if s.state is State.RUNNING and s not in running_before]
        waiting = [s for s in sequences if s.state is State.WAITING]
        for s in started:
            passed = [w.rank for w in waiting if self.urgency(w) < self.urgency(s)]
            hold("nobody starts while one who goes first waits", not passed, s.rank, passed)
        for s in running_before:
            if s.state is State.WAITING:
                running = [r for r in sequences if r.state is State.RUNNING]
                kept = [r.rank for r in running if self.urgency(r) > self.urgency(s)]
                hold("the last of the running is preempted", not kept, s.rank, kept)

    def _check_progress(self, sequences: list[Sequence], plan: StepPlan | None) -> None:
        rows = {row.row for row in plan.rows} if plan is not None else set()
        for s in sequences:
            if s.state is State.RUNNING and s.row not in rows:
                short = self.cache.room(s) <= s.scheduled
                hold("a running sequence advances unless blocks lack", self._wants(s) <= 0 or short, s.rank)

    def _check_admission(
        self, sequences: list[Sequence], running_before: dict[Sequence, int], plan: StepPlan | None
    ) -> None:
        """Nobody starts on what the running still want; the first that waits starts as soon as it fits."""
        counts = {row.row: row.count for row in plan.rows} if plan is not None else {}
        running = [s for s in sequences if s.state is State.RUNNING]
        starts = [next(s for s in sequences if s.row == start.row) for start in (plan.starts if plan else ())]
        bar = math.inf
        for s in running:
            if s not in starts and counts.get(s.row, 0) < running_before[s]:
                bar = min(bar, s.request.priority)
        for s in starts:
            hold("nobody starts on what the running want", s.request.priority < bar, s.rank, bar)
            if counts[s.row] < len(s.tokens) - s.computed:
                bar = -math.inf
        waiting = [s for s in sequences if s.state is State.WAITING]
        first = min(waiting, key=self.urgency, default=None)
        spent = plan is not None and plan.tokens >= self.config.max_num_batched_tokens
        if first is None or first.in_flight or first.request.priority >= bar or spent or not self._rows:
            return
        needed = self.cache.peak_blocks(
            len(first.tokens), self.config.max_num_batched_tokens * self.config.steps_in_flight
        )
        growth = len(running) * len(self.cache.groups)
        hold("what fits starts", needed + growth > self.cache.pool.available, first.rank)

    def _check_plan(self, plan: StepPlan, by_row: dict[int | None, Sequence]) -> None:
        budget, rows = self.config.max_num_batched_tokens, [row.row for row in plan.rows]
        hold("the budget is kept", plan.tokens <= budget, plan.tokens, budget)
        hold("a row runs once in a plan", len(set(rows)) == len(rows), rows)
        hold("rows are within max_num_seqs", all(0 <= r < self.config.max_num_seqs for r in rows), rows)
        hold("what starts also runs", {s.row for s in plan.starts} <= set(rows), plan.starts)
        row_of = {row.row: row for row in plan.rows}
        for start in plan.starts:
            sequence = by_row[start.row]
            hold("a start carries all tokens", start.tokens == sequence.tokens, sequence.rank)
            asks = sequence.index == 0 and sequence.output_length == 0
            wanted = sequence.params.prompt_logprobs if asks else None
            hold("prompt logprobs are asked for once", start.prompt_logprobs == wanted, sequence.rank)
            self.found.setdefault((sequence.request.request_id, sequence.index), row_of[start.row].start)
            for block in {b for table in start.tables for b in table if b >= 0}:
                writer = self.tenant_of_block.get(block)
                hold("tenants share no block", writer == self._tenant(sequence), block, writer, sequence.rank)
        size, pool = self.cache.block_size, self.cache.pool
        for row in plan.rows:
            sequence, end = by_row[row.row], row.start + row.count
            for group, table, new in zip(self.cache.groups, sequence.tables, row.new_blocks, strict=True):
                first = group.first_visible(row.start) // size
                seen = table[first : -(-end // size)]
                hold("visible blocks are in the table", -1 not in seen, sequence.rank, table, row)
                written = table[row.start // size : -(-end // size)]
                shared = [b for b in written if pool.references(b) != 1]
                hold("nobody else holds a block that is written", not shared, sequence.rank, shared)
                for block in new:
                    self.tenant_of_block[block] = self._tenant(sequence)

    def _tenant(self, sequence: Sequence) -> str:
        request = sequence.request
        return f"salt {request.cache_salt}" if self.config.reuse_prefix else request.request_id
