"""Any interleaving of legs, cancels, releases and steps: right tokens, one ending, a balance, no deadlock."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from engine_scenarios import VOCAB, examples
from hypothesis import given
from hypothesis import strategies as st
from test_handoff import Side, copy, engine, request

from headrace.engine import GroupSpec
from headrace.engine.intake import NO_PROGRESS
from headrace.engine.sequence import State
from headrace.protocol.handoff import Declined, Dropped, Held, Leg, Reserved
from headrace.protocol.requests import ErrorCode, FinishReason, GenerateRequest, Progress
from headrace.sim.hash_executor import expected, model_of

LONGEST = 40


class World:
    """Two engines of a random shape, and what a supervisor between them would do, in a random order."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.groups = rng.choice(
            [(GroupSpec(),), (GroupSpec(), GroupSpec(rng.randint(1, 9))), (GroupSpec(3),)]
        )
        longest = 10 * len(self.groups)
        limits: dict[str, Any] = {
            "groups": self.groups,
            "max_model_len": LONGEST,
            "max_num_seqs": rng.randint(1, 4),
            "steps_in_flight": rng.randint(1, 3),
        }
        self.a = Side(engine(num_blocks=rng.randint(longest, 2 * longest), **limits))
        self.b = Side(engine(num_blocks=rng.randint(longest, 2 * longest), **limits))
        self.model = model_of(self.b.engine)
        self.asked: dict[str, GenerateRequest] = {}
        self.cancelled: set[str] = set()
        self.begun: set[str] = set()
        self.prefix: dict[str, int] = {}  # tokens that the importer was told to go on from
        self.seen = {id(self.a): 0, id(self.b): 0}

    def arrive(self, number: int) -> None:
        rng = self.rng
        stream = random.Random(rng.randrange(2))
        prompt = [stream.randrange(VOCAB) for _ in range(rng.randint(1, LONGEST - 2))]
        name = f"r{number}"
        asked = request(
            name,
            prompt,
            rng.choice([0, 0, 0, 1, -1]),
            max_tokens=rng.choice([1, 2, 5, 20]),
            n=rng.choice([1, 1, 2]),
            temperature=1.0,
            seed=number,
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 3]))),
            prompt_logprobs=rng.choice([None, None, 1]),
        )
        self.asked[name] = asked
        if rng.random() < 0.6:
            self.b.engine.add(asked, NO_PROGRESS, Leg.IMPORT, rng.choice([0, 4]))
            self.a.engine.add(asked, NO_PROGRESS, Leg.EXPORT)
        else:
            self.begun.add(name)
            whole = [expected(asked, i, self.model, LONGEST).tokens for i in range(asked.sampling.n)]
            split = rng.randrange(len(whole[0]))
            self.prefix[name] = split
            self.b.engine.add(asked, Progress(generated={0: whole[0][:split]}))

    def cancel(self) -> None:
        if self.asked:
            name = self.rng.choice(list(self.asked))
            self.cancelled.add(name)
            self.rng.choice([self.a, self.b]).engine.cancel(name)

    async def step(self, eager: bool) -> None:
        """One step of one engine or both, and some of what follows from its events."""
        for side in (self.a, self.b):
            if eager or self.rng.random() < 0.7:
                await side.step()
        for name, asked in self.asked.items():
            if eager or self.rng.random() < 0.3:
                self.follow(name, asked)

    def follow(self, name: str, asked: GenerateRequest) -> None:
        a, b = self.a, self.b
        ready, gone = b.told(Reserved, name), b.told(Dropped, name)
        if name not in self.begun:
            first, over = a.of(name), bool(a.endings(name))
            if b.told(Declined, name) or b.endings(name):
                self.begun.add(name)
                a.engine.cancel(name)
            elif over and (not first or a.endings(name)[0] is not FinishReason.ERROR) and first:
                self.begun.add(name)  # the first token was the last one of sample 0
                self.cancelled.add(name)
                b.engine.cancel(name)
            elif a.told(Held, name) and ready and self.rng.random() < 0.8:
                copy(a, name, b, name)
                self.begin(name, True, first)
            elif over or (a.told(Held, name) and self.rng.random() < 0.2):
                self.begin(name, False, first)
        if name in self.begun:
            if a.told(Held, name) or a.told(Dropped, name):
                a.engine.release(name)
            if gone:
                b.engine.release(name)

    def begin(self, name: str, imported: bool, first: list[int]) -> None:
        self.begun.add(name)
        sequences = [s for s in self.b.engine.scheduler.sequences() if s.request.request_id == name]
        if sequences and sequences[0].state is not State.ENDED and sequences[0].handoff is not None:
            self.prefix[name] = len(first)
        self.b.engine.begin(name, imported, first)

    def check(self) -> None:
        for name, asked in self.asked.items():
            for index in range(asked.sampling.n):
                alone = expected(asked, index, self.model, LONGEST).tokens
                skipped = self.prefix.get(name, 0) if index == 0 else 0
                got = self.b.of(name, index)
                assert got == alone[skipped : skipped + len(got)], name
                (ending,) = self.b.endings(name, index)
                if ending is FinishReason.ERROR:
                    errors = [o.finish.error for o in self.b.outputs if o.request_id == name and o.finish]
                    codes = {error.code for error in errors if error}
                    assert codes <= {ErrorCode.OUT_OF_BLOCKS, ErrorCode.INVALID}
                elif ending is not FinishReason.CANCELLED:
                    assert skipped + len(got) == len(alone)
                else:
                    assert name in self.cancelled
        assert self.a.is_clean() and self.b.is_clean()


async def play(seed: int) -> World:
    world = World(random.Random(seed))
    for number in range(world.rng.randint(1, 6)):
        world.arrive(number)
        for _ in range(world.rng.choice([0, 1, 3, 8])):
            await world.step(False)
        if world.rng.random() < 0.3:
            world.cancel()
    for _ in range(2500):
        if world.a.engine.scheduler.is_empty and world.b.engine.scheduler.is_empty:
            break
        await world.step(True)
    else:
        raise AssertionError("the legs never end")
    world.check()
    return world


@examples(250)
@given(st.integers(0, 1 << 32))
def test_any_history_of_legs_ends_well(seed: int) -> None:
    asyncio.run(play(seed))


def test_the_histories_reach_what_they_are_for() -> None:
    kinds = set()
    for seed in range(60):
        world = asyncio.run(play(seed))
        kinds |= {type(event) for side in (world.a, world.b) for event in side.events}
        kinds |= {"preempted"} if world.b.engine.scheduler.counters.preemptions else set()
    assert {Held, Dropped, Reserved, Declined, "preempted"} <= kinds
