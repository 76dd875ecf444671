"""What one engine is asked for, and what it answers: the scheduler as others see it.

There are no phases. Each step hands out a budget of tokens so that every sequence's `scheduled` catches up
with what it wants: a prompt in chunks, the rest of a prompt after a prefix hit, one token of a decode, all
of it again after a preemption. `planner` decides who runs, `lifecycle` keeps the books.
"""

from __future__ import annotations

from headrace.engine.intake import (
    NO_PROGRESS,
    check_generated,
    new_sequences,
    open_samples,
    refuse_what_cannot_run,
    shared_salt,
)
from headrace.engine.limits import RequestRefused
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.planner import Planner
from headrace.engine.sequence import Sequence, State
from headrace.protocol.handoff import HandoffEvent, Leg
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    Progress,
    SequenceOutput,
)


class Scheduler(Planner):
    """Plans steps over one `KVCache`. `schedule` and `commit` cost O(sequences that change)."""

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
        salt = shared_salt(request) if self.config.reuse_prefix else f"own:{self._arrivals}"
        root = self.cache.root(salt)
        sequences = new_sequences(request, progress, leg, offload_above, self.config, root, self._arrivals)
        self._arrivals += 1
        self._requests[name] = sequences
        self._expect(sequences[0])
        self._waiting.push(sequences[0])
        self._num_blocked += len(sequences) - 1
        if leg is Leg.EXPORT:
            self._handoffs.accepted(sequences[0], shared_salt(request))
        self._idle = False

    def _expect(self, sequence: Sequence) -> None:
        """Foresee what a sequence that comes in will have computed here; of an import nothing will be."""
        if sequence.handoff is None or sequence.handoff.leg is Leg.EXPORT:
            cached = 0
            if sequence.reads_cache and self.config.reuse_prefix:
                cached = self.cache.match(sequence).length
            sequence.queued_tokens = len(sequence.tokens) - cached

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
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed, for those that wait and those that run. O(running)."""
        running = 0
        for sequence in self._running:
            left = len(sequence.tokens) - sequence.computed
            if left > 1:
                running += left
        return self._waiting.tokens + running

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

    def _refuse_where_full(self, samples: int) -> None:
        """Raise RequestRefused where so many more sequences are too many."""
        most = self.config.max_num_seqs + self.config.max_waiting
        if self.num_running + self.num_waiting + samples > most:
            raise RequestRefused(
                ErrorCode.OVERLOADED,
                f"{self.num_running} sequences run, {self.num_waiting} wait, and the limit is {most}",
            )
