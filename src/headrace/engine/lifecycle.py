"""Where sequences are, and how they move: preempted, ended, held for others, given back, let go.

The books of a scheduler and every change of them that is no plan. What a step should run is decided
elsewhere; here a sequence that leaves RUNNING keeps row and blocks until no step in flight names them.
"""

from __future__ import annotations

from collections.abc import Iterator

from headrace.engine.cache import KVCache
from headrace.engine.handoff import Handoffs
from headrace.engine.options import SchedulerConfig, SchedulerCounters
from headrace.engine.plan import StepResult
from headrace.engine.queue import WaitingQueue
from headrace.engine.sequence import Sequence, State
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    RequestError,
    SequenceOutput,
    TokenLogprobs,
)


class Lifecycle:
    """Every sequence of one engine by its state, rows and blocks with whom they are."""

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

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no row, and samples that wait for the first of their request."""
        handoffs = self._handoffs
        return len(self._waiting) + self._num_blocked + len(handoffs.importing) + len(handoffs.filled)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that has not ended or still holds blocks, for those who check invariants."""
        for group in self._requests.values():
            yield from group
        yield from (sequence for sequence in self._draining if sequence.state is State.ENDED)

    # ---- results and endings -------------------------------------------------------------------------

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
        sequence.cached_tokens = None
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
