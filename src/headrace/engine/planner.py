"""Which tokens of which sequences run in the next step.

Running sequences come first, the most urgent first, each with at least one token; what is left of the
budget admits others in order of rank: imports whose blocks were filled, then those that wait.

When blocks run out, the sequence of the lowest rank gives up its own and waits, to be computed again. So
the highest rank always advances, and everything ends: nothing stalls but for blocks that a handoff keeps,
nothing starves within a priority.
"""

from __future__ import annotations

import math
from bisect import insort

from headrace.engine.cache import PrefixHit
from headrace.engine.intake import out_of_blocks, shared_salt
from headrace.engine.lifecycle import Lifecycle
from headrace.engine.plan import RowStart, ScheduledRow, StepPlan
from headrace.engine.sequence import Sequence, State
from headrace.protocol.handoff import Leg


class Planner(Lifecycle):
    """Plans steps; a plan's results come back to whoever commits it."""

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
        self._handoffs.reserve(sequence, hit, shared_salt(sequence.request))
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


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
