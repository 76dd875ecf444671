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
from headrace.engine.handoff import Handoffs
from headrace.engine.intake import (
    NO_PROGRESS,
    check_generated,
    new_sequences,
    open_samples,
    out_of_blocks,
    refuse_what_cannot_run,
)
from headrace.engine.limits import RequestRefused
from headrace.engine.options import SchedulerConfig, SchedulerCounters
from headrace.engine.plan import RowStart, ScheduledRow, StepPlan, StepResult
from headrace.engine.queue import WaitingQueue
from headrace.engine.sequence import Sequence, State
from headrace.protocol.handoff import HandoffEvent, Leg
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    Progress,
    RequestError,
    SequenceOutput,
    TokenLogprobs,
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
        self._handoffs = Handoffs(cache, config.max_leased_blocks)
        self._idle = False  # nothing changes but by what comes in

    # ---- what comes in -------------------------------------------------------------------------------

    def add(
        self,
        request: GenerateRequest,
        progress: Progress = NO_PROGRESS,
        leg: Leg = Leg.WHOLE,
        offload_above: int = 0,
    ) -> None:
        """Accept a request, or one leg of its handoff, or end it at once with the reason.

        ValueError: an id in use, or a `progress` after which nothing is left to do.
        """
        name = request.request_id
        if name in self._requests or self._handoffs.keeps(name):
            raise ValueError(f"request id {name!r} is in use")
        samples = open_samples(request, progress, leg)
        try:
            refuse_what_cannot_run(request, progress, self.config, self.cache)
            self._refuse_where_full(len(samples))
        except RequestRefused as refused:
            finish = Finish(FinishReason.ERROR, error=refused.error)
            for index in samples:
                self._outputs.append(SequenceOutput(name, index, finish=finish))
            return
        # Without prefix reuse a request still shares blocks among its own samples, and with nobody else.
        salt = _shared(request) if self.config.reuse_prefix else f"own:{self._arrivals}"
        root = self.cache.root(salt)
        sequences = new_sequences(request, progress, leg, offload_above, self.config, root, self._arrivals)
        self._arrivals += 1
        self._requests[name] = sequences
        self._waiting.push(sequences[0])
        self._num_blocked += len(sequences) - 1
        if leg is Leg.EXPORT:
            self._handoffs.accepted(sequences[0], _shared(request))
        self._idle = False

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or its sample `index`; one that has ended already is left alone.

        What an export holds for others is quarantined.
        """
        for sequence in list(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, Finish(FinishReason.CANCELLED))
        if not index:
            self._handoffs.cancel(request_id)
        self._idle = False

    def begin(self, request_id: str, imported: bool, generated: list[int]) -> None:
        """Let an import run: its blocks are filled, or (not `imported`) nobody fills or touches them.

        `generated` is what sample 0 has so far. Unknown ids, and those that wait for no handoff, are left
        alone. ValueError: blocks that were not reserved, or were filled without a token after them, or tokens
        that the sample cannot go on from.
        """
        sequence = next(iter(self._requests.get(request_id, ())), None)
        handoff = sequence.handoff if sequence is not None else None
        if sequence is None or handoff is None or handoff.leg is not Leg.IMPORT or handoff.filled:
            return
        tokens = [*sequence.request.prompt, *generated]
        if imported and (sequence.state is not State.IMPORTING or len(tokens) <= handoff.length):
            raise ValueError(f"import {request_id!r} has no blocks, or no token after them, to begin with")
        if tokens[: len(sequence.tokens)] != sequence.tokens:
            raise ValueError(f"import {request_id!r} begins with other tokens than it was added with")
        try:
            check_generated(sequence.request, 0, generated, self.config)
        except RequestRefused as refused:
            raise ValueError(str(refused)) from None
        sequence.tokens = tokens
        sequence.prompt_logprobs_done |= bool(generated)
        if imported:
            sequence.cached_tokens = sequence.computed
            self._handoffs.fill(sequence)
            self._unblock_samples(sequence)
        elif sequence.state is State.IMPORTING:
            self._queue_again(sequence)
        else:
            sequence.handoff = None
        self._wake()

    def release(self, request_id: str) -> None:
        """Give back what is kept for the handoff of a leg; unknown ids are left alone."""
        self._handoffs.release(request_id)
        self._wake()

    def _wake(self) -> None:
        """Something came in: look again at who is stuck, and whether there is work."""
        self._idle = False
        self._stuck = None

    # ---- what goes out -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no row, and samples that wait for the first of their request."""
        handoffs = self._handoffs
        return len(self._waiting) + self._num_blocked + len(handoffs.importing) + len(handoffs.filled)

    @property
    def held_tokens(self) -> int:
        """Positions that held blocks carry, over all groups. O(running).

        Only full blocks are shared, so what is empty is counted once in the tables of its one holder.
        """
        size = self.cache.block_size
        empty = sum(
            len(table) * size - sequence.computed
            for sequences in (self._running, self._handoffs.filled)
            for sequence in sequences
            for table in sequence.tables
        )
        for sequence in self._handoffs.importing:
            if sequence.handoff is not None:
                empty += len(sequence.handoff.blocks()) * size
        return self.cache.pool.held * size - empty

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may find something, or something waits to be told.

        Not while all that is here waits for `begin` or `release`.
        """
        if self._outputs or self._handoffs.has_events:
            return True
        return bool(self._requests) and not self._idle

    @property
    def is_empty(self) -> bool:
        """Whether every request has ended, all was told, and no leg of a handoff keeps blocks."""
        return not (self._requests or self._outputs or self._draining) and self._handoffs.empty

    def take_handoffs(self) -> list[HandoffEvent]:
        """What has happened to legs since the last call, in order."""
        return self._handoffs.take_events()

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
        preemptions = self.counters.preemptions
        budget, bar = self._schedule_running(plan, planned, budget)
        self._admit(plan, planned, budget, bar)
        if not planned:
            told = self._outputs or self._handoffs.has_events
            self._idle = not (self._submitted or told or self.counters.preemptions != preemptions)
            return None
        self._steps += 1
        self._submitted[plan.number] = planned
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in a step's result: advance `computed`, append tokens, end, free and publish."""
        self._idle = False
        for i, (row, sequence) in enumerate(zip(plan.rows, self._submitted.pop(plan.number), strict=True)):
            sequence.in_flight -= 1
            sequence.pending -= row.sample
            if i in result.failed and sequence.state is not State.ENDED:
                self._end(sequence, Finish(FinishReason.ERROR, error=result.failed[i]))
            elif sequence.state is not State.ENDED:  # what was preempted meanwhile finds its blocks again
                sequence.computed += row.count
                self.cache.advance(sequence)
                if sequence.handoff is not None:
                    self._handoffs.computed(sequence)
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
        names, or from handoffs. None: it waits for those, or has given up its own as the last in rank, or has
        ended, since alone it can go no further.
        """
        handoffs = self._handoffs
        while (room := self.cache.room(sequence) - sequence.scheduled) < count:
            if self._draining or self.cache.pool.quarantined:
                break
            if len(self._running) + len(handoffs.filled) == 1:
                break
            victim = self._last()
            self._preempt(victim)
            if victim is sequence:
                return 0
        if room == 0 and sequence.in_flight == 0 and not self._draining and not handoffs.blocks_return:
            self._end(sequence, out_of_blocks(sequence, self.cache))
        return min(room, count)

    def _admit(self, plan: StepPlan, planned: list[Sequence], budget: int, bar: float) -> None:
        """Start waiting sequences below the bar, in order of rank, while rows, blocks and budget last."""
        while budget > 0 and (sequence := self._next()) is not None:
            if sequence.request.priority >= bar or sequence.in_flight:
                return  # in flight: preempted a moment ago, its last step still runs
            leg = sequence.handoff.leg if sequence.handoff is not None else Leg.WHOLE
            if sequence.state is State.IMPORTING:
                if self._rows and self.cache.room(sequence) > sequence.scheduled:
                    budget = self._start(plan, planned, sequence, None, budget)
                    continue
                if self._rows and self._make_way(sequence):
                    continue
            elif leg is Leg.EXPORT and not self._handoffs.may_lease(len(sequence.tokens)):
                return
            elif (self._rows or leg is Leg.IMPORT) and not self._is_stuck(sequence):
                hit = self.cache.match(sequence) if sequence.reads_cache else None
                if leg is Leg.IMPORT:
                    if self._handoffs.declines(sequence, hit):
                        continue
                    hit = self.cache.trim(hit or self._no_hit(), len(sequence.tokens))
                alone = not (self._running or self._draining or self._handoffs.filled)
                alone = alone and not self._handoffs.blocks_return
                if self._fits(sequence, hit) or (alone and self._fits_in_small_chunks(sequence)):
                    if leg is Leg.IMPORT:
                        self._reserve(sequence, hit or self._no_hit())
                    else:
                        budget = self._start(plan, planned, sequence, hit, budget)
                    continue
                if alone:
                    self._end(sequence, out_of_blocks(sequence, self.cache))
                    continue
                self._stuck = (sequence, self.cache.pool.available, len(self._running))
            if not self._preempt_for(sequence):
                return

    def _next(self) -> Sequence | None:
        """Who starts next: an import that has its blocks goes before those that wait, if as urgent."""
        first = self._waiting.first()
        filled = self._handoffs.filled
        if filled and (first is None or filled[0].request.priority <= first.request.priority):
            return filled[0]
        return first

    def _make_way(self, sequence: Sequence) -> bool:
        """Find room for the first filled import where nobody runs; False: it must wait."""
        handoffs = self._handoffs
        if self._running or self._draining:
            return False
        if len(handoffs.filled) > 1:
            self._preempt(handoffs.filled[-1])
            return True
        if not handoffs.blocks_return:
            self._end(sequence, out_of_blocks(sequence, self.cache))
            return True
        return False

    def _reserve(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Give an import its blocks; it waits for them to be filled, without a row."""
        self._waiting.remove(sequence)
        sequence.state = State.IMPORTING
        self._handoffs.reserve(sequence, hit, _shared(sequence.request))
        self.counters.prefix_queries += sequence.prompt_length
        self.counters.prefix_hits += sequence.computed

    def _no_hit(self) -> PrefixHit:
        return PrefixHit(0, [[] for _ in self.cache.groups])

    def _is_stuck(self, sequence: Sequence) -> bool:
        """Whether a sequence did not fit and nothing was given back since: looking again would be vain."""
        if self._stuck is None:
            return False
        who, available, running = self._stuck
        return who is sequence and self.cache.pool.available <= available and len(self._running) >= running

    def _fits(self, sequence: Sequence, hit: PrefixHit | None) -> bool:
        """Whether all that is known of a sequence fits, with blocks to grow for each running one."""
        length = len(sequence.tokens)
        handoff = sequence.handoff
        if handoff is not None and handoff.leg is Leg.IMPORT:
            needed = self.cache.visible_blocks(length)
        else:
            needed = self.cache.peak_blocks(length, self._in_flight_tokens)
        growing = len(self._running) + len(self._handoffs.importing) + len(self._handoffs.filled)
        available = self.cache.pool.available
        if hit is not None:
            found = [block for table in hit.tables for block in table if block >= 0]
            needed -= len(found)
            available -= sum(self.cache.pool.references(block) == 0 for block in found)
        return needed + growing * len(self.cache.groups) <= available

    def _fits_in_small_chunks(self, sequence: Sequence) -> bool:
        """Whether the whole cache is enough for a sequence, given time for its windows to move on."""
        return self.cache.least_blocks(len(sequence.tokens)) <= self.cache.pool.total

    def _start(
        self, plan: StepPlan, planned: list[Sequence], sequence: Sequence, hit: PrefixHit | None, budget: int
    ) -> int:
        """Move the next sequence to a row and plan its first tokens; return the budget left."""
        name = sequence.request.request_id
        if sequence.state is State.IMPORTING:
            self._handoffs.starts(sequence)
            self._stuck = None
            self._started.append((name, sequence.index))
        else:
            self._waiting.remove(sequence)
            self.cache.adopt(sequence, hit or self._no_hit())
            if sequence.handoff is not None:
                self._handoffs.exporting(sequence, len(sequence.tokens))
        sequence.state = State.RUNNING
        sequence.row = self._rows.pop()
        insort(self._running, sequence, key=_rank)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self._started.append((name, sequence.index))
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
        """Positions to compute now: as far as its tokens are known or being sampled, and it may reach."""
        wanted = len(sequence.tokens) + sequence.pending
        return (wanted if wanted < sequence.reach else sequence.reach) - sequence.scheduled

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
        first, sequence.answered = not sequence.answered, True
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
        elif sequence.handoff is not None:
            self._handoffs.hold(sequence)
            sequence.handoff = None
            self._remove(sequence)
        elif first and sequence.leads:
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
        if self._draining or not (self._running or self._handoffs.filled):
            return False
        if self._rows and self.cache.pool.quarantined:
            return False
        victim = self._last()
        if victim.request.priority <= sequence.request.priority:
            return False
        self._preempt(victim)
        return True

    def _last(self) -> Sequence:
        """Who gives up blocks first: the last in rank of those that run or have all they need to."""
        filled, running = self._handoffs.filled, self._running
        if filled and (not running or filled[-1].rank > running[-1].rank):
            return filled[-1]
        return running[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, or of an import that has no row yet.

        It waits at its rank and is computed again; but an export ends, as others have begun to read it.
        """
        self.counters.preemptions += 1
        if sequence.state is State.IMPORTING:
            self._queue_again(sequence)
            return
        if sequence.handoff is not None:
            text = "the prefill gave its blocks up to more urgent requests"
            self._end(sequence, Finish(FinishReason.ERROR, error=RequestError(ErrorCode.UNAVAILABLE, text)))
            return
        self._running.remove(sequence)
        sequence.state = State.WAITING
        self._waiting.push(sequence)
        self._leave(sequence)

    def _queue_again(self, sequence: Sequence) -> None:
        """Give back the blocks of an import: from now on it is computed here."""
        self._handoffs.abandon(sequence)
        self._stuck = None
        sequence.state = State.WAITING
        self._waiting.push(sequence)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """End a sequence for a reason other than its tokens."""
        self._outputs.append(SequenceOutput(sequence.request.request_id, sequence.index, finish=finish))
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take an ended sequence out of everything; its ending is already among the outputs."""
        if sequence.handoff is not None:
            self._handoffs.drop(sequence)
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._leave(sequence)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is State.IMPORTING:
            self._handoffs.abandon(sequence)
            self._stuck = None
        else:
            self._num_blocked -= 1
        sequence.state = State.ENDED
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
        elif sequence.leads:
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

    def _refuse_where_full(self, samples: int) -> None:
        """Raise RequestRefused where so many more sequences are too many."""
        most = self.config.max_num_seqs + self.config.max_waiting
        if self.num_running + self.num_waiting + samples > most:
            raise RequestRefused(
                ErrorCode.OVERLOADED,
                f"{self.num_running} sequences run, {self.num_waiting} wait, and the limit is {most}",
            )

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that has not ended or still holds blocks, for those who check invariants."""
        for group in self._requests.values():
            yield from group
        yield from (sequence for sequence in self._draining if sequence.state is State.ENDED)


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _shared(request: GenerateRequest) -> str:
    """The salt of blocks that all requests of a tenant share."""
    return f"shared:{request.cache_salt}"
