"""Runs a scenario on a whole engine and checks, after every plan and every step, what must always hold.

A broken rule is a `Violation` that names the rule. Nothing here asks the engine whether it is right: what
each request must produce, which blocks it needs and what every identity stands for is computed on the side.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

from engine_scenarios import Arrive, Cancel, Scenario
from engine_watch import WatchedScheduler, hold

from headrace.engine import Engine, KVCache, Scheduler
from headrace.engine.blocks import BlockRemoved
from headrace.engine.sequence import State
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    SequenceOutput,
    TokenLogprobs,
)
from headrace.sim.hash_executor import HashExecutor
from headrace.sim.hash_model import Expected, HashModel, expected


@dataclass
class Sample:
    """What one sample must produce, and what it has produced."""

    request: GenerateRequest
    index: int
    alone: Expected
    finish: FinishReason
    """How it ends when nobody cancels it."""
    refused: ErrorCode | None = None
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    outputs: int = 0
    ending: Finish | None = None


class Witness:
    """An engine under watch, and everything it owes."""

    def __init__(self, scenario: Scenario, watch: bool) -> None:
        self.watch = watch
        self.scenario = scenario
        self.config = scenario.config
        self.model = HashModel(self.config.vocab_size, self.config.eos_token_ids, scenario.groups)
        self.cache = KVCache(
            num_blocks=scenario.num_blocks, block_size=scenario.block_size, groups=scenario.groups
        )
        self.scheduler = (WatchedScheduler if watch else Scheduler)(self.config, self.cache)
        self.executor = HashExecutor(
            self.model,
            num_blocks=scenario.num_blocks,
            block_size=scenario.block_size,
            depth=self.config.steps_in_flight,
        )
        self.engine = Engine(self.scheduler, self.executor)
        self.samples: dict[tuple[str, int], Sample] = {}
        self.truth: dict[bytes, list[int]] = {}  # identity -> the values that its block must hold
        self.index: dict[bytes, int] = {}  # replayed from events
        self.events = 0
        self.steps = 0

    # ---- what happens --------------------------------------------------------------------------------

    async def run(self) -> Witness:
        """Play the actions, then step until all is done, and hold the engine to the end result."""
        for action in self.scenario.actions:
            if isinstance(action, Arrive):
                self.arrive(action.request)
            elif isinstance(action, Cancel):
                self.cancel(action)
            else:
                await self.step()
        bound = self.steps + self._most_steps()
        while self.engine.has_work:
            await self.step()
            hold("everything ends within its bound of steps", self.steps <= bound, self.steps, bound)
        self._check_end()
        return self

    def arrive(self, request: GenerateRequest) -> None:
        refused = self._refusal(request)
        for index in range(request.sampling.n):
            alone = expected(request, index, self.model, self.config.max_model_len)
            self.samples[request.request_id, index] = Sample(
                request, index, *self._alone(request, alone), refused=refused
            )
        self.engine.add(request)
        for sequence in self.scheduler.sequences():
            if sequence.request is request:
                self._state_truth(sequence.root, self.samples[request.request_id, sequence.index])

    def cancel(self, cancel: Cancel) -> None:
        for (request_id, index), sample in self.samples.items():
            if request_id == cancel.request_id and cancel.index in (None, index) and sample.ending is None:
                sample.cancelled = sample.refused is None
        self.engine.cancel(cancel.request_id, cancel.index)

    async def step(self) -> None:
        had_work = self.engine.has_work
        outputs = await self.engine.step()
        self.steps += 1
        hold("a step with work does some", bool(outputs or self.engine.last_step) == had_work, self.steps)
        for output in outputs:
            self._take(output)
        for key, sample in self.samples.items():
            hold("a cancelled sample ends in the next step", sample.ending or not sample.cancelled, key)
        if self.watch:
            self._check_books()
            self._check_events()

    # ---- what must hold ------------------------------------------------------------------------------

    def _take(self, output: SequenceOutput) -> None:
        key = (output.request_id, output.index)
        sample, alone = self.samples[key], self.samples[key].alone
        hold("nothing follows an ending", sample.ending is None, key, output)
        hold("an output carries something", output.tokens or output.finish, key)
        done = len(sample.tokens)
        sample.tokens += output.tokens
        hold(
            "tokens are those of the request alone",
            sample.tokens == alone.tokens[: len(sample.tokens)],
            key,
            sample.tokens,
            alone.tokens,
        )
        if output.tokens and sample.request.sampling.logprobs is not None:
            reported = alone.logprobs[done : len(sample.tokens)]
            hold("logprobs are those of the request alone", output.logprobs == reported, key, output.logprobs)
        else:
            hold("logprobs come where asked for", output.logprobs is None, key)
        first = done == 0 and bool(output.tokens)
        wanted = alone.prompt_logprobs if first else None
        hold(
            "prompt logprobs come once, whole", output.prompt_logprobs == wanted, key, output.prompt_logprobs
        )
        hold("cached_tokens comes with the first output", (output.cached_tokens is not None) == first, key)
        if output.cached_tokens is not None:
            whole = output.cached_tokens % self.cache.block_size == 0
            hold("cached tokens are whole blocks of the prompt", whole, key, output.cached_tokens)
            hold("cached tokens leave one to compute", output.cached_tokens < len(sample.request.prompt), key)
            if isinstance(self.scheduler, WatchedScheduler):
                hold("cached tokens are those found", output.cached_tokens == self.scheduler.found[key], key)
        sample.ending = output.finish

    def _check_books(self) -> None:
        pool = self.cache.pool
        pool.check()
        hold("free + cached + held is total", pool.free + pool.cached + pool.held == pool.total)
        named: Counter[int] = Counter()
        rows = []
        waiting = 0
        for s in self.scheduler.sequences():
            named.update(block for table in s.tables for block in table if block >= 0)
            rows += [s.row] if s.row is not None else []
            waiting += s.state in (State.WAITING, State.BLOCKED)
            hold("who runs has a row", s.row is not None or s.state is not State.RUNNING, s.rank)
            hold("who holds blocks has a row", s.row is not None or not any(s.tables), s.rank)
            hold("computed ≤ scheduled", 0 <= s.computed <= s.scheduled <= s.wanted, s.rank)
        counts = {block: pool.references(block) for block in range(pool.total) if pool.references(block)}
        hold("references are the tables that name a block", counts == dict(named), counts, named)
        hold("rows are unique", len(set(rows)) == len(rows), rows)
        hold("waiting is counted", self.scheduler.num_waiting == waiting, waiting)

    def _check_events(self) -> None:
        pool = self.cache.pool
        for event in pool.take_events():
            self.events += 1
            hold("events have no gap", event.number == self.events, event, self.events)
            if isinstance(event, BlockRemoved):
                del self.index[event.identity]
                continue
            hold("an identity is stored once", event.identity not in self.index, event)
            self.index[event.identity] = event.block
            hold("an identity is that of a full block", event.identity in self.truth, event)
            values = self.executor.values[event.block].tolist()
            hold("a block holds what its identity says", values == self.truth[event.identity], event)
            hold("what is offered is computed", event.block not in self.executor.blocks_being_written, event)
        found = {identity: pool.find(identity) for identity in self.index}
        hold("events replay to the index", found == self.index and pool.known == len(self.index))

    def _check_end(self) -> None:
        for key, sample in self.samples.items():
            finish = sample.ending
            hold("every sample has an ending", finish is not None, key)
            if sample.refused is not None:
                hold("refusals name what was wrong", finish.error.code == sample.refused, key, finish)
                continue
            if finish.reason is FinishReason.CANCELLED:
                hold("only the cancelled end so", sample.cancelled, key)
                continue
            hold("the output is whole", sample.tokens == sample.alone.tokens, key, sample.tokens, finish)
            hold("the ending is that of the request alone", finish.reason is sample.finish, key, finish)
            if finish.reason is FinishReason.ERROR:
                hold("out of blocks is said so", finish.error.code is ErrorCode.OUT_OF_BLOCKS, key, finish)
                hold("the limit is named", f"{self.cache.pool.total} blocks" in finish.error.message, finish)
            if finish.reason is FinishReason.STOP:
                hold("the stop token is named", finish.stop_token == sample.tokens[-1], key, finish)
        if isinstance(self.scheduler, WatchedScheduler):
            asked = sum(len(self.samples[key].request.prompt) for key in self.scheduler.found)
            counters = (self.scheduler.counters.prefix_queries, self.scheduler.counters.prefix_hits)
            hold(
                "a prompt is counted once", counters == (asked, sum(self.scheduler.found.values())), counters
            )
        hold("nothing is held at the end", self.cache.pool.held == 0, self.cache.pool.held)
        hold("no sequence is left", not list(self.scheduler.sequences()))

    # ---- what is owed, computed on the side ----------------------------------------------------------

    def _needed(self, position: int) -> int:
        """Blocks that a sequence holds, at the least, while it computes one position."""
        size = self.cache.block_size
        return sum(
            position // size - group.first_visible(position) // size + 1 for group in self.cache.groups
        )

    def _refusal(self, request: GenerateRequest) -> ErrorCode | None:
        length = len(request.prompt)
        needed = max(self._needed(position) for position in range(length))
        if length >= self.config.max_model_len or needed > self.cache.pool.total:
            return ErrorCode.INVALID
        unended = self.scheduler.num_running + self.scheduler.num_waiting
        if unended + request.sampling.n > self.config.max_num_seqs + self.config.max_waiting:
            return ErrorCode.OVERLOADED
        return None

    def _alone(self, request: GenerateRequest, alone: Expected) -> tuple[Expected, FinishReason]:
        """What a sample produces in this pool when it is alone there, and how it ends."""
        length = len(request.prompt)
        for count in range(1, len(alone.tokens)):
            if self._needed(length + count - 1) > self.cache.pool.total:
                cut = Expected(alone.tokens[:count], alone.logprobs, alone.prompt_logprobs, alone.values)
                return cut, FinishReason.ERROR
        last, params = alone.tokens[-1], request.sampling
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self.config.eos_token_ids)}
        return alone, FinishReason.STOP if last in stops else FinishReason.LENGTH

    def _state_truth(self, root: bytes, sample: Sample) -> None:
        """What each identity stands for that this sample may publish."""
        size, parent = self.cache.block_size, root
        tokens = [*sample.request.prompt, *sample.alone.tokens]
        for begin in range(0, len(tokens) - size, size):
            content = b"".join(token.to_bytes(4, "little") for token in tokens[begin : begin + size])
            parent = blake2b(parent + content, digest_size=len(root)).digest()
            for number, values in enumerate(sample.alone.values):
                self.truth[parent + number.to_bytes(2, "big")] = values[begin : begin + size]

    def _most_steps(self) -> int:
        """Steps that what is left needs at most, if in each round of `depth` + 1 the first rank advances."""
        left = [s for s in self.samples.values() if s.ending is None]
        positions = sum(len(s.request.prompt) + len(s.alone.tokens) + 1 for s in left)
        return (positions + 1) * (self.config.steps_in_flight + 1)


def play(scenario: Scenario, *, watch: bool = True) -> Witness:
    """Run a scenario to its end; raises Violation, or whatever the engine or its executor raises.

    Without `watch` only what comes out is looked at: tokens, endings, and that all is given back.
    """
    return asyncio.run(Witness(scenario, watch).run())
