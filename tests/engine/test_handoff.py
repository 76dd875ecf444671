"""Legs of handoffs and replays on hash engines: every token depends on every value in every block.

`Pair` is what lies between two engines: it copies blocks by the events alone, and gives them back.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from engine_scenarios import EOS, VOCAB

from headrace.engine import Engine, GroupSpec, SchedulerConfig
from headrace.engine.intake import NO_PROGRESS
from headrace.protocol.handoff import (
    BlockSpan,
    Computed,
    Declined,
    Dropped,
    Exporting,
    HandoffEvent,
    Held,
    Leg,
    Reserved,
)
from headrace.protocol.requests import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Progress,
    SamplingParams,
    SequenceOutput,
)
from headrace.sim.hash_executor import HashExecutor, expected, hash_engine, model_of

SIZE = 4
FULL, MIXED = (GroupSpec(),), (GroupSpec(), GroupSpec(6))
LONGEST = 60


def engine(num_blocks: int = 60, groups: tuple[GroupSpec, ...] = FULL, **limits: Any) -> Engine:
    defaults: dict[str, Any] = {"max_model_len": LONGEST, "vocab_size": VOCAB, "eos_token_ids": EOS}
    config = SchedulerConfig(**{**defaults, "max_num_seqs": 4, "max_num_batched_tokens": 8, **limits})
    return hash_engine(
        config, num_blocks=num_blocks, block_size=SIZE, groups=groups, key=b"k", fingerprint=b"f"
    )


def request(name: str, prompt: list[int], priority: int = 0, **params: Any) -> GenerateRequest:
    sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params})
    return GenerateRequest(request_id=name, prompt=prompt, priority=priority, sampling=sampling)


def tokens(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def executor(one: Engine) -> HashExecutor:
    assert isinstance(one.executor, HashExecutor)
    return one.executor


class Side:
    """An engine, what it said, and a balance that is struck after each step."""

    def __init__(self, one: Engine) -> None:
        self.engine = one
        self.outputs: list[SequenceOutput] = []
        self.events: list[HandoffEvent] = []

    async def step(self) -> list[HandoffEvent]:
        self.outputs += await self.engine.step()
        self.balance()
        new = self.engine.take_handoffs()
        self.events += new
        return new

    async def settle(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                return
            await self.step()
        raise AssertionError("the engine never comes to rest")

    def balance(self) -> None:
        pool = self.engine.scheduler.cache.pool
        pool.check()
        assert pool.free + pool.cached + pool.held + pool.leased + pool.quarantined == pool.total

    def of(self, name: str, index: int = 0) -> list[int]:
        return [t for o in self.outputs if (o.request_id, o.index) == (name, index) for t in o.tokens]

    def endings(self, name: str, index: int = 0) -> list[FinishReason]:
        mine = [o for o in self.outputs if (o.request_id, o.index) == (name, index)]
        return [o.finish.reason for o in mine if o.finish is not None]

    def told(self, kind: type, name: str) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and event.request_id == name]

    def is_clean(self) -> bool:
        pool = self.engine.scheduler.cache.pool
        pool.check()
        nothing = (pool.held, pool.leased, pool.quarantined) == (0, 0, 0)
        return nothing and self.engine.scheduler.is_empty and not self.engine.has_work


def places(spans: list[BlockSpan]) -> dict[tuple[int, int], int]:
    return {(s.group, s.first + i): block for s in spans for i, block in enumerate(s.blocks)}


def copy(source: Side, exported: str, target: Side, imported: str) -> None:
    """Fill an import's blocks from those that the export told of."""
    have = places([span for event in source.told(Computed, exported) for span in event.spans])
    (reserved,) = target.told(Reserved, imported)
    (exporting,) = source.told(Exporting, exported)
    assert exporting.identities == reserved.identities
    size = executor(source.engine).block_bytes
    for place, block in places(reserved.fill).items():
        other = have[place]
        there = executor(source.engine).memory()[other * size : (other + 1) * size]
        executor(target.engine).memory()[block * size : (block + 1) * size] = there


async def hand_over(a: Side, b: Side, asked: GenerateRequest) -> None:
    b.engine.add(asked, NO_PROGRESS, Leg.IMPORT)
    await b.settle()
    a.engine.add(asked, NO_PROGRESS, Leg.EXPORT)
    await a.settle()
    name = asked.request_id
    assert len(a.told(Held, name)) == 1 and a.endings(name) == []
    copy(a, name, b, name)
    b.engine.begin(name, True, a.of(name))
    a.engine.release(name)
    await b.settle()


def check(a: Side, b: Side, asked: GenerateRequest) -> None:
    """The first token from one engine and the others from the other are what one alone produces."""
    model = model_of(b.engine)
    for index in range(asked.sampling.n):
        alone = expected(asked, index, model, b.engine.scheduler.config.max_model_len)
        first = a.of(asked.request_id) if index == 0 else []
        assert first + b.of(asked.request_id, index) == alone.tokens
        assert len(b.endings(asked.request_id, index)) == 1
        told = [
            o for side in (a, b) for o in side.outputs if (o.request_id, o.index) == (asked.request_id, index)
        ]
        assert [lp for o in told for lp in o.logprobs or ()] == (alone.logprobs or [])
        prompts = [o.prompt_logprobs for o in told if o.prompt_logprobs is not None]
        assert prompts == ([alone.prompt_logprobs] if alone.prompt_logprobs is not None else [])


@pytest.mark.parametrize("groups", [FULL, MIXED, (GroupSpec(1), GroupSpec(9)), (GroupSpec(4),)])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 3, 8, 21, 24])
def test_a_handoff_changes_no_token(groups: tuple[GroupSpec, ...], depth: int, length: int) -> None:
    async def body() -> None:
        a, b = (Side(engine(groups=groups, steps_in_flight=depth)) for _ in range(2))
        asked = request("r", tokens(length), n=3, logprobs=1, prompt_logprobs=1, temperature=1.0, seed=5)
        await hand_over(a, b, asked)
        check(a, b, asked)
        assert a.is_clean() and b.is_clean()
        assert [e.positions for e in a.told(Computed, "r")][-1] == length

    asyncio.run(body())


@pytest.mark.parametrize("groups", [FULL, MIXED])
def test_what_the_importer_has_is_not_filled(groups: tuple[GroupSpec, ...]) -> None:
    async def body() -> None:
        a, b = Side(engine(groups=groups)), Side(engine(groups=groups))
        prompt = tokens(22)
        b.engine.add(request("before", prompt[:13], max_tokens=2))
        await b.settle()
        asked = request("r", prompt)
        await hand_over(a, b, asked)
        check(a, b, asked)
        (reserved,) = b.told(Reserved, "r")
        assert reserved.cached_tokens == 12 and (0, 0) not in places(reserved.fill)
        cached = [o.cached_tokens for o in b.outputs if o.request_id == "r"]
        assert cached[0] == 12 and set(cached[1:]) == {None}
        # the blocks that came from elsewhere are found by the next
        b.engine.add(request("after", prompt))
        await b.settle()
        assert next(o.cached_tokens for o in b.outputs if o.request_id == "after") == (
            20 if groups is FULL else 12
        )
        assert b.of("after") == expected(asked, 0, model_of(b.engine), LONGEST).tokens
        assert a.is_clean() and b.is_clean()

    asyncio.run(body())


def test_an_import_that_is_cached_declines_and_runs_whole() -> None:
    async def body() -> None:
        b = Side(engine())
        asked = request("r", tokens(22))
        b.engine.add(request("before", asked.prompt))
        await b.settle()
        b.engine.add(asked, NO_PROGRESS, Leg.IMPORT, 2)
        await b.settle()
        assert b.told(Declined, "r") == [Declined("r", 20)] and not b.told(Reserved, "r")
        assert b.of("r") == expected(asked, 0, model_of(b.engine), LONGEST).tokens and b.is_clean()

    asyncio.run(body())


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("sampled", [0, 1, 2])
@pytest.mark.parametrize("groups", [FULL, MIXED])
def test_an_import_that_fails_is_computed_here(
    reserved: bool, sampled: int, groups: tuple[GroupSpec, ...]
) -> None:
    async def body() -> None:
        b = Side(engine(groups=groups))
        asked = request("r", tokens(21), n=2)
        alone = [expected(asked, i, model_of(b.engine), LONGEST).tokens for i in range(2)]
        b.engine.add(asked, NO_PROGRESS, Leg.IMPORT)
        if reserved:
            await b.settle()
            assert b.told(Reserved, "r") and not b.engine.has_work
        b.engine.begin("r", False, alone[0][:sampled])
        await b.settle()
        assert alone[0][:sampled] + b.of("r") == alone[0] and b.of("r", 1) == alone[1]
        assert b.is_clean()

    asyncio.run(body())


def test_an_export_that_ends_with_its_first_token_is_quarantined() -> None:
    async def body() -> None:
        a = Side(engine())
        a.engine.add(request("r", tokens(9), max_tokens=1), NO_PROGRESS, Leg.EXPORT)
        await a.settle()
        assert a.endings("r") == [FinishReason.LENGTH] and len(a.told(Dropped, "r")) == 1
        pool = a.engine.scheduler.cache.pool
        assert (pool.leased, pool.quarantined) == (0, 3)
        a.engine.release("r")
        assert a.is_clean()

    asyncio.run(body())


def test_held_blocks_stay_as_they_are_until_they_are_released() -> None:
    async def body() -> None:
        a = Side(engine(num_blocks=10))
        a.engine.add(request("r", tokens(18)), NO_PROGRESS, Leg.EXPORT)
        await a.settle()
        have = sorted(places([s for e in a.told(Computed, "r") for s in e.spans]).values())
        pool, values = a.engine.scheduler.cache.pool, executor(a.engine).values
        assert pool.leased == len(have) == 5
        before = values[have].copy()
        for number in range(5):
            a.engine.add(request(f"x{number}", tokens(15, number), max_tokens=3))
        await a.settle()
        assert (values[have] == before).all() and pool.leased == 5
        a.engine.cancel("r")
        assert (pool.leased, pool.quarantined) == (0, 5)
        await a.settle()
        assert len(a.told(Dropped, "r")) == 1 and a.endings("r") == []
        with pytest.raises(ValueError, match="in use"):
            a.engine.add(request("r", tokens(3)))
        a.engine.release("r")
        a.engine.release("r")
        assert a.is_clean()

    asyncio.run(body())


def test_exports_wait_for_the_cap_on_leases() -> None:
    async def body() -> None:
        a = Side(engine(num_blocks=60, max_leased_blocks=8))
        for name, length in (("one", 20), ("two", 20), ("huge", 50)):
            a.engine.add(request(name, tokens(length, length + len(name))), NO_PROGRESS, Leg.EXPORT)
        for name in ("one", "two", "huge"):
            await a.settle()
            assert [e.request_id for e in a.events if isinstance(e, Held)][-1] == name
            assert not a.engine.has_work
            a.engine.release(name)
        assert a.is_clean()

    asyncio.run(body())


def test_an_export_that_must_give_way_ends() -> None:
    async def body() -> None:
        a = Side(engine(max_num_seqs=1))
        a.engine.add(request("r", tokens(30), priority=5), NO_PROGRESS, Leg.EXPORT)
        await a.step()
        urgent = request("urgent", tokens(9, 3))
        a.engine.add(urgent)
        await a.settle()
        error = next(o.finish.error for o in a.outputs if o.request_id == "r" and o.finish is not None)
        assert error is not None and error.code is ErrorCode.UNAVAILABLE
        assert len(a.told(Dropped, "r")) == 1 and a.engine.scheduler.cache.pool.quarantined == 2
        assert a.of("urgent") == expected(urgent, 0, model_of(a.engine), LONGEST).tokens
        a.engine.release("r")
        assert a.is_clean()

    asyncio.run(body())


def test_a_lone_sequence_waits_for_blocks_that_an_import_holds() -> None:
    async def body() -> None:
        b = Side(engine(num_blocks=8, max_num_seqs=1, max_num_batched_tokens=8))
        lone, late = request("lone", tokens(3), max_tokens=25), request("late", tokens(12, 2))
        b.engine.add(lone)
        await b.step()
        b.engine.add(late, NO_PROGRESS, Leg.IMPORT)
        await b.settle()
        assert b.endings("lone") == [] and b.told(Reserved, "late")
        b.engine.cancel("late")
        await b.settle()
        assert b.endings("late") == [FinishReason.CANCELLED] and b.endings("lone") == []
        assert b.engine.scheduler.cache.pool.quarantined == 3
        b.engine.release("late")
        await b.settle()
        assert b.of("lone") == expected(lone, 0, model_of(b.engine), LONGEST).tokens and b.is_clean()

    asyncio.run(body())


@pytest.mark.parametrize("ended", [[], [0], [1]])
@pytest.mark.parametrize("split", range(12))
def test_a_replay_goes_on_where_it_was(split: int, ended: list[int]) -> None:
    async def body() -> None:
        b = Side(engine(groups=MIXED))
        asked = request("r", tokens(14), n=3, logprobs=0, prompt_logprobs=1, temperature=1.0)
        alone = [expected(asked, i, model_of(b.engine), LONGEST) for i in range(3)]
        had = {0: split, 1: 11 - split, 2: 0}
        progress = Progress(
            generated={i: alone[i].tokens[:count] for i, count in had.items()},
            ended=ended,
            prompt_logprobs_told=split > 0,
        )
        b.engine.add(asked, progress)
        await b.settle()
        for i, count in had.items():
            assert b.of("r", i) == ([] if i in ended else alone[i].tokens[count:])
            logprobs = [lp for o in b.outputs if o.index == i for lp in o.logprobs or ()]
            assert logprobs == ([] if i in ended else (alone[i].logprobs or [])[count:])
        told = [o.prompt_logprobs for o in b.outputs if o.prompt_logprobs is not None]
        assert told == ([alone[0].prompt_logprobs] if split == 0 and 0 not in ended else [])
        assert b.is_clean()

    asyncio.run(body())


def test_progress_that_cannot_be_is_refused() -> None:
    b = engine()
    asked = request("r", [1, 2], n=2, max_tokens=3, stop_token_ids=(9,))
    for progress in (
        Progress(generated={0: [5, 5, 5]}),
        Progress(generated={1: [9]}),
        Progress(ended=[0, 1]),
    ):
        with pytest.raises(ValueError, match="ended"):
            b.add(asked, progress)
    for leg in (Leg.EXPORT, Leg.IMPORT):
        with pytest.raises(ValueError, match="sample 0"):
            b.add(asked, Progress(ended=[0]), leg)
    for progress in (Progress(generated={0: [VOCAB]}), Progress(generated={2: []}), Progress(ended=[-1])):
        b.add(asked, progress)
        outputs = b.scheduler.take_outputs()
        assert {o.finish.error.code for o in outputs if o.finish and o.finish.error} == {ErrorCode.INVALID}
    assert b.scheduler.is_empty


def test_begin_holds_its_caller_to_what_an_import_needs() -> None:
    async def body() -> None:
        b = Side(engine())
        asked = request("r", tokens(9), max_tokens=2, stop_token_ids=(9,))
        b.engine.begin("nobody", True, [1])
        b.engine.release("nobody")
        b.engine.add(asked, NO_PROGRESS, Leg.IMPORT)
        with pytest.raises(ValueError, match="no blocks"):
            b.engine.begin("r", True, [1])
        await b.settle()
        for generated in ([], [9], [1, 1], [VOCAB]):
            with pytest.raises(ValueError):
                b.engine.begin("r", True, generated)
        b.engine.cancel("r")
        b.engine.begin("r", True, [1])
        b.engine.release("r")
        await b.settle()
        assert b.endings("r") == [FinishReason.CANCELLED] and b.is_clean()

    asyncio.run(body())
