"""Which tokens of which sequences run in the next step, and what follows from a step that ran.

There are no phases. Each step hands out a budget of tokens so that every sequence's `scheduled` catches up
with what it wants: a prompt in chunks, the rest of a prompt after a prefix hit, one token of a decode, all
of it again after a preemption. Running sequences come first, the most urgent first, each with at least one
token; what is left of the budget admits waiting ones in order of rank.

When blocks run out, the sequence of the lowest rank gives up its own and waits, to be computed again. So
the highest rank always advances, and everything ends: nothing stalls, nothing starves within a priority.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator

from headrace.engine.cache import KVCache, PrefixHit
from headrace.engine.limits import ModelLimits, RequestRefused, check_request, num_samples
from headrace.engine.options import SchedulerConfig, SchedulerCounters
from headrace.engine.plan import RowStart, ScheduledRow, StepPlan, StepResult
from headrace.engine.queue import WaitingQueue
from headrace.engine.sequence import Sequence, State
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    RequestError,
    SequenceOutput,
    TokenLogprobs,
    sample_seed,
)


class Scheduler:
    """Plans steps over one `KVCache`. `schedule` and `commit` cost O(sequences that change)."""

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self.config = config
        self.cache = cache
        self.counters = SchedulerCounters()
        self._requests: dict[str, list[Sequence]] = {}
        self._running: list[Sequence] = []  # by rank
        self._waiting = WaitingQueue()
        self._num_blocked = 0
        self._draining: set[Sequence] = set()  # not running, but named by a step in flight
        self._rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._submitted: dict[int, list[Sequence]] = {}
        self._in_flight_tokens = config.max_num_batched_tokens * config.steps_in_flight
        self._stuck: tuple[Sequence, int, int] | None = None
        """Who waited first and did not fit, the blocks available then, and how many ran."""
        self._arrivals = 0
        self._steps = 0
        self._outputs: list[SequenceOutput] = []
        self._started: list[tuple[str, int]] = []

    # ---- what comes in -------------------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> None:
        """Accept a request, or end it at once with the reason. An id in use is a ValueError."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        try:
            self._refuse_what_cannot_run(request)
        except RequestRefused as refused:
            finish = Finish(FinishReason.ERROR, error=refused.error)
            for index in range(num_samples(request)):
                self._outputs.append(SequenceOutput(request.request_id, index, finish=finish))
            return
        # Without prefix reuse a request still shares blocks among its own samples, and with nobody else.
        salt = f"shared:{request.cache_salt}" if self.config.reuse_prefix else f"own:{self._arrivals}"
        root = self.cache.root(salt)
        params = request.sampling
        stops = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else self.config.eos_token_ids
        )
        limit = min(len(request.prompt) + params.max_tokens, self.config.max_model_len)
        sequences = [
            Sequence(
                request=request,
                index=index,
                rank=(request.priority, self._arrivals, index),
                seed=sample_seed(params.seed, index),
                root=root,
                stops=stops,
                limit=limit,
                state=State.WAITING if index == 0 else State.BLOCKED,
                tokens=list(request.prompt),
            )
            for index in range(params.n)
        ]
        self._arrivals += 1
        self._requests[request.request_id] = sequences
        self._waiting.push(sequences[0])
        self._num_blocked += params.n - 1

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or its sample `index`; one that has ended already is left alone."""
        for sequence in list(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, Finish(FinishReason.CANCELLED))

    # ---- what goes out -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no row, and samples that wait for the first of their request."""
        return len(self._waiting) + self._num_blocked

    @property
    def held_tokens(self) -> int:
        """Positions that held blocks carry, over all groups. O(running).

        Only full blocks are shared, so what is empty is counted once in the tables of its one holder.
        """
        size = self.cache.block_size
        empty = sum(
            len(table) * size - sequence.computed for sequence in self._running for table in sequence.tables
        )
        return self.cache.pool.held * size - empty

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outputs)

    def take_outputs(self) -> list[SequenceOutput]:
        """What has happened to sequences since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_started(self) -> list[tuple[str, int]]:
        """Samples (request id, index) that were scheduled for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def schedule(self) -> StepPlan | None:
        """Plan the next step and advance `scheduled`; None when there is nothing to compute now."""
        plan = StepPlan(self._steps, [], [])
        planned: list[Sequence] = []
        budget = self.config.max_num_batched_tokens
        budget, bar = self._schedule_running(plan, planned, budget)
        self._admit(plan, planned, budget, bar)
        if not planned:
            return None
        self._steps += 1
        self._submitted[plan.number] = planned
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in a step's result: advance `computed`, append tokens, end, free and publish."""
        for i, (row, sequence) in enumerate(zip(plan.rows, self._submitted.pop(plan.number), strict=True)):
            sequence.in_flight -= 1
            sequence.pending -= row.sample
            if i in result.failed and sequence.state is not State.ENDED:
                self._end(sequence, Finish(FinishReason.ERROR, error=result.failed[i]))
            elif sequence.state is not State.ENDED:  # what was preempted meanwhile finds its blocks again
                sequence.computed += row.count
                self.cache.advance(sequence)
                self._take_result(sequence, i, result)
            if self._draining and sequence.in_flight == 0 and sequence in self._draining:
                self._give_back(sequence)

    # ---- planning ------------------------------------------------------------------------------------

    def _schedule_running(self, plan: StepPlan, planned: list[Sequence], budget: int) -> tuple[int, float]:
        """Give every running sequence what it wants, the most urgent first.

        One that is less urgent than the first that waits yields: it takes a single position. Returns what
        is left of the budget, and the bar: only those more urgent than all that got less than they want
        may start with it.
        """
        first = self._waiting.first()
        urgent = math.inf if first is None else first.request.priority
        bar = math.inf
        i = 0
        while i < len(self._running):  # which gets shorter where blocks run out
            sequence = self._running[i]
            wanted = self._uncomputed(sequence)
            if wanted > 0:
                others = len(self._running) - i - 1  # each is sure of one token
                most = 1 if sequence.request.priority > urgent else budget - others
                count = wanted if wanted < most else most
                if not self.cache.covers(sequence, sequence.scheduled + count):
                    count = self._make_room(sequence, count)
                if count > 0:
                    self._plan_row(plan, planned, sequence, count)
                    budget -= count
                if count < wanted and sequence.state is State.RUNNING:
                    bar = min(bar, sequence.request.priority)
            i += 1
        return budget, bar

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """How many of `count` positions have room, after taking blocks from lower ranks where they lack.

        Fewer: the sequence is alone, or blocks are on their way from sequences that a step in flight still
        names. None: it waits for those, or has given up its own as the last in rank, or has ended, since
        alone it can go no further.
        """
        while (room := self.cache.room(sequence) - sequence.scheduled) < count:
            victim = self._running[-1]
            if self._draining or len(self._running) == 1:
                break
            self._preempt(victim)
            if victim is sequence:
                return 0
        if room == 0 and sequence.in_flight == 0 and not self._draining:
            self._end(sequence, self._out_of_blocks(sequence))
        return min(room, count)

    def _admit(self, plan: StepPlan, planned: list[Sequence], budget: int, bar: float) -> None:
        """Start waiting sequences below the bar, in order of rank, while rows, blocks and budget last."""
        while budget > 0 and (sequence := self._waiting.first()) is not None:
            if sequence.request.priority >= bar or sequence.in_flight:
                return  # in flight: preempted a moment ago, its last step still runs
            if self._rows and not self._is_stuck(sequence):
                hit = self.cache.match(sequence) if sequence.reads_cache else None
                alone = not self._running and not self._draining
                if self._fits(sequence, hit) or (alone and self._fits_in_small_chunks(sequence)):
                    budget = self._start(plan, planned, sequence, hit, budget)
                    continue
                if alone:
                    self._end(sequence, self._out_of_blocks(sequence))
                    continue
                self._stuck = (sequence, self.cache.pool.available, len(self._running))
            if not self._preempt_for(sequence):
                return

    def _is_stuck(self, sequence: Sequence) -> bool:
        """Whether a sequence did not fit and nothing was given back since: looking again would be vain."""
        if self._stuck is None:
            return False
        who, available, running = self._stuck
        return who is sequence and self.cache.pool.available <= available and len(self._running) >= running

    def _fits(self, sequence: Sequence, hit: PrefixHit | None) -> bool:
        """Whether all that is known of a sequence fits, with blocks to grow for each running one."""
        length = len(sequence.tokens)
        needed = self.cache.peak_blocks(length, self._in_flight_tokens)
        available = self.cache.pool.available
        if hit is not None:
            found = [block for table in hit.tables for block in table if block >= 0]
            needed -= len(found)
            available -= sum(self.cache.pool.references(block) == 0 for block in found)
        return needed + len(self._running) * len(self.cache.groups) <= available

    def _fits_in_small_chunks(self, sequence: Sequence) -> bool:
        """Whether the whole cache is enough for a sequence, given time for its windows to move on."""
        return self.cache.least_blocks(len(sequence.tokens)) <= self.cache.pool.total

    def _start(
        self, plan: StepPlan, planned: list[Sequence], sequence: Sequence, hit: PrefixHit | None, budget: int
    ) -> int:
        """Move the first waiting sequence to a row and plan its first tokens; return the budget left."""
        self._waiting.remove(sequence)
        sequence.state = State.RUNNING
        sequence.row = self._rows.pop()
        insort(self._running, sequence, key=_rank)
        self.cache.adopt(sequence, hit or PrefixHit(0, [[] for _ in self.cache.groups]))
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self._started.append((sequence.request.request_id, sequence.index))
            self.counters.prefix_queries += sequence.prompt_length
            self.counters.prefix_hits += sequence.computed
        plan.starts.append(
            RowStart(
                row=sequence.row,
                tokens=list(sequence.tokens),
                prompt_length=sequence.prompt_length,
                sampling=sequence.params,
                seed=sequence.seed,
                prompt_logprobs=None if sequence.reads_cache else sequence.params.prompt_logprobs,
                tables=[list(table) for table in sequence.tables],
            )
        )
        room = self.cache.room(sequence) - sequence.scheduled
        count = min(self._uncomputed(sequence), budget, room)
        self._plan_row(plan, planned, sequence, count)
        return budget - count

    def _plan_row(self, plan: StepPlan, planned: list[Sequence], sequence: Sequence, count: int) -> None:
        if sequence.row is None:
            raise RuntimeError("a running sequence has no row")
        start = sequence.scheduled
        length = start + count
        cache = self.cache
        blocks = cache.no_blocks if cache.covers(sequence, length) else cache.extend(sequence, length)
        sample = length == len(sequence.tokens) + sequence.pending
        plan.rows.append(ScheduledRow(sequence.row, start, count, sample, blocks))
        planned.append(sequence)
        sequence.scheduled = length
        sequence.pending += sample
        sequence.in_flight += 1

    def _uncomputed(self, sequence: Sequence) -> int:
        """Positions to compute now. The last token that a sequence may have is never computed."""
        wanted = len(sequence.tokens) + sequence.pending
        return (wanted if wanted < sequence.limit else sequence.limit - 1) - sequence.scheduled

    # ---- consequences --------------------------------------------------------------------------------

    def _take_result(self, sequence: Sequence, i: int, result: StepResult) -> None:
        """Append what a step sampled, report it, and end the sequence where a token ends it."""
        if result.prompt_logprobs and i in result.prompt_logprobs:
            sequence.prompt_logprobs.extend(result.prompt_logprobs[i])
        tokens = result.tokens[i]
        if not tokens:
            return
        taken, finish = 0, None
        while finish is None and taken < len(tokens):
            sequence.tokens.append(tokens[taken])
            taken += 1
            finish = self._finish_after(sequence)
        first = sequence.output_length == taken
        prompt_logprobs = None
        if first and not sequence.reads_cache:
            sequence.prompt_logprobs_done = True
            prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        logprobs: list[TokenLogprobs] | None = result.logprobs.get(i) if result.logprobs else None
        self._outputs.append(
            SequenceOutput(
                sequence.request.request_id,
                sequence.index,
                tokens if taken == len(tokens) else tokens[:taken],
                logprobs[:taken] if logprobs is not None else None,
                prompt_logprobs,
                sequence.cached_tokens if first else None,
                finish,
            )
        )
        if finish is not None:
            self._remove(sequence)
        elif first and sequence.index == 0:
            self._unblock_samples(sequence)

    def _finish_after(self, sequence: Sequence) -> Finish | None:
        """Whether the last token ends its sequence. Before min_tokens the executor samples no stop token."""
        token = sequence.tokens[-1]
        if token in sequence.stops:
            return Finish(FinishReason.STOP, stop_token=token)
        if len(sequence.tokens) >= sequence.limit:
            return Finish(FinishReason.LENGTH)
        return None

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Preempt the last running sequence, if it is less urgent than `sequence` (not merely later).

        Not while blocks are on their way: a step in flight may still name those of an earlier victim.
        """
        if self._draining or not self._running:
            return False
        victim = self._running[-1]
        if victim.request.priority <= sequence.request.priority:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence; it waits at its rank and is computed again."""
        self.counters.preemptions += 1
        self._running.remove(sequence)
        sequence.state = State.WAITING
        self._waiting.push(sequence)
        self._leave(sequence)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """End a sequence for a reason other than its tokens."""
        self._outputs.append(SequenceOutput(sequence.request.request_id, sequence.index, finish=finish))
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take an ended sequence out of everything; its ending is already among the outputs."""
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._leave(sequence)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        else:
            self._num_blocked -= 1
        sequence.state = State.ENDED
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
        elif sequence.index == 0:
            self._unblock_samples(sequence)

    def _unblock_samples(self, first: Sequence) -> None:
        """Let samples 1.. go: the prompt's blocks are there to be shared."""
        for sample in self._requests.get(first.request.request_id, ()):
            if sample.state is State.BLOCKED:
                sample.state = State.WAITING
                self._num_blocked -= 1
                self._waiting.push(sample)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.in_flight:
            self._draining.add(sequence)
        else:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Return row and blocks: no step in flight names them."""
        self._draining.discard(sequence)
        if sequence.row is None:
            raise RuntimeError("a sequence gave its row back twice")
        self._rows.append(sequence.row)
        sequence.row = None
        sequence.prompt_logprobs = []
        self.cache.release(sequence)

    # ---- refusals ------------------------------------------------------------------------------------

    def _refuse_what_cannot_run(self, request: GenerateRequest) -> None:
        """Raise RequestRefused where a request can never be served, or the queue is full."""
        check_request(request, ModelLimits(self.config.max_model_len, self.config.vocab_size))
        pool = self.cache.pool
        needed = self.cache.least_blocks(len(request.prompt))
        if needed > pool.total:
            raise RequestRefused(
                ErrorCode.INVALID,
                f"the prompt needs {needed} KV blocks and the cache has {pool.total} "
                f"(block_size {self.cache.block_size}); shorten it or raise --kv-cache-memory",
                "prompt",
            )
        most = self.config.max_num_seqs + self.config.max_waiting
        if self.num_running + self.num_waiting + request.sampling.n > most:
            raise RequestRefused(
                ErrorCode.OVERLOADED,
                f"{self.num_running} sequences run, {self.num_waiting} wait, and the limit is {most}",
            )

    def _out_of_blocks(self, sequence: Sequence) -> Finish:
        pool = self.cache.pool
        return Finish(
            FinishReason.ERROR,
            error=RequestError(
                ErrorCode.OUT_OF_BLOCKS,
                f"after {sequence.output_length} output tokens the sequence of {len(sequence.tokens)} needs "
                f"more than the {pool.total} blocks of the KV cache (block_size {self.cache.block_size}); "
                "ask for fewer tokens or raise --kv-cache-memory",
                "max_tokens",
            ),
        )

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that has not ended or still holds blocks, for those who check invariants."""
        for group in self._requests.values():
            yield from group
        yield from (sequence for sequence in self._draining if sequence.state is State.ENDED)


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
