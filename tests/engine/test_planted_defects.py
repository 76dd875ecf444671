"""The proof proves something: each defect below, planted into the engine, is caught by the random histories.

`rule` is what caught it, the first time it showed. `shows` is what betrays it with all looking inside
switched off: wrong tokens, a plan that the hash executor cannot run, a missing or second ending. None: it
breaks a promise that outputs cannot show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from engine_scenarios import draw_scenario
from engine_witness import play

from headrace.engine import intake, planner
from headrace.engine.blocks import BlockPool
from headrace.engine.cache import GroupSpec, KVCache, PrefixHit
from headrace.engine.plan import RowStart
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, State
from headrace.protocol.requests import Finish, GenerateRequest, SequenceOutput

SEEDS = range(200)

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Defect:
    plant: Plant
    rule: str
    shows: str | None


def forget_a_reference(patch: pytest.MonkeyPatch) -> None:
    real = BlockPool.hold

    def hold(self: BlockPool, blocks: Iterable[int]) -> None:
        real(self, list(blocks)[:-1])

    patch.setattr(BlockPool, "hold", hold)


def forget_to_release(patch: pytest.MonkeyPatch) -> None:
    real = BlockPool.release

    def release(self: BlockPool, blocks: Iterable[int]) -> None:
        real(self, list(blocks)[:3])

    patch.setattr(BlockPool, "release", release)


def reuse_blocks_of_a_step_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_leave", Scheduler._give_back)


def skip_the_salt(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.root
    patch.setattr(KVCache, "root", lambda self, salt: real(self, ""))


def hash_a_partial_block(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.advance

    def advance(self: KVCache, sequence: Sequence) -> None:
        real(self, sequence)
        _publish_up_to(self, sequence, -(-sequence.computed // self.block_size))

    patch.setattr(KVCache, "advance", advance)


def publish_before_computed(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._plan_row

    def plan_row(self: Scheduler, plan: object, planned: object, sequence: Sequence, count: int) -> None:
        real(self, plan, planned, sequence, count)
        known = min(sequence.scheduled, len(sequence.tokens))
        _publish_up_to(self.cache, sequence, known // self.cache.block_size)

    patch.setattr(Scheduler, "_plan_row", plan_row)


def _publish_up_to(cache: KVCache, sequence: Sequence, full: int) -> None:
    cache._hash_up_to(sequence, full)
    for j in range(sequence.published, full):
        for number, table in enumerate(sequence.tables):
            cache.pool.publish(table[j], sequence.hashes[j] + number.to_bytes(2, "big"))
    sequence.published = max(full, sequence.published)


def keep_the_identity_of_a_block_taken_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_forget", lambda self, block: None)


def let_groups_share_identities(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("headrace.engine.cache._identity", lambda chained, group: chained)


def resume_one_position_late(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.adopt

    def adopt(self: KVCache, sequence: Sequence, hit: PrefixHit) -> None:
        real(self, sequence, hit)
        if sequence.output_length > 0:
            sequence.scheduled = sequence.computed = hit.length + 1

    patch.setattr(KVCache, "adopt", adopt)


def resume_without_the_last_token(patch: pytest.MonkeyPatch) -> None:
    def start(*, tokens: list[int], prompt_length: int, **rest: object) -> RowStart:
        kept = max(prompt_length, len(tokens) - 1)
        return RowStart(tokens=tokens[:kept], prompt_length=prompt_length, **rest)  # type: ignore[arg-type]

    patch.setattr(planner, "RowStart", start)


def resume_with_the_old_length(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.adopt

    def adopt(self: KVCache, sequence: Sequence, hit: PrefixHit) -> None:
        before = sequence.output_length and sequence.prompt_length
        real(self, sequence, hit)
        sequence.scheduled = sequence.computed = max(before, hit.length)

    patch.setattr(KVCache, "adopt", adopt)


def lose_the_cancel_of_what_waits(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._end

    def end(self: Scheduler, sequence: Sequence, finish: Finish) -> None:
        if sequence.state is not State.WAITING:
            real(self, sequence, finish)

    patch.setattr(Scheduler, "_end", end)


def drop_the_ending_of_the_preempted(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._remove

    def remove(self: Scheduler, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self._outputs.pop()
        real(self, sequence)

    patch.setattr(Scheduler, "_remove", remove)


def end_twice(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._remove

    def remove(self: Scheduler, sequence: Sequence) -> None:
        real(self, sequence)
        if sequence.in_flight:
            last = self._outputs[-1]
            self._outputs.append(SequenceOutput(last.request_id, last.index, finish=last.finish))

    patch.setattr(Scheduler, "_remove", remove)


def forget_blocked_samples(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._unblock_samples

    def unblock(self: Scheduler, first: Sequence) -> None:
        if first.state is not State.ENDED:
            real(self, first)

    patch.setattr(Scheduler, "_unblock_samples", unblock)


def trim_the_window_a_block_early(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.advance

    def advance(self: KVCache, sequence: Sequence) -> None:
        real(self, sequence)
        for group, table in zip(self.groups, sequence.tables, strict=True):
            j = group.first_visible(sequence.computed) // self.block_size
            if group.window is not None and j < sequence.published and table[j] >= 0:
                self.pool.release((table[j],))
                table[j] = -1

    patch.setattr(KVCache, "advance", advance)


def trim_by_what_is_scheduled(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.advance

    def advance(self: KVCache, sequence: Sequence) -> None:
        real(self, sequence)
        for group, table in zip(self.groups, sequence.tables, strict=True):
            for j in range(group.first_visible(sequence.scheduled) // self.block_size):
                if table[j] >= 0:
                    self.pool.release((table[j],))
                    table[j] = -1

    patch.setattr(KVCache, "advance", advance)


def see_one_position_too_few(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.match

    def match(self: KVCache, sequence: Sequence) -> PrefixHit:
        groups = self.groups
        self.groups = tuple(GroupSpec(g.window and max(1, g.window - 1)) for g in groups)
        try:
            return real(self, sequence)
        finally:
            self.groups = groups

    patch.setattr(KVCache, "match", match)


def adopt_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.match

    def match(self: KVCache, sequence: Sequence) -> PrefixHit:
        sequence.tokens.append(0)  # one more, so that none is left to compute
        try:
            return real(self, sequence)
        finally:
            sequence.tokens.pop()

    patch.setattr(KVCache, "match", match)


def preempt_the_first(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._preempt
    patch.setattr(Scheduler, "_preempt", lambda self, sequence: real(self, self._running[0]))


def let_the_young_pass(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler.add

    def add(self: Scheduler, request: GenerateRequest, *how: Any) -> None:
        self._arrivals -= 2  # counts down: the last to arrive has the smallest rank
        real(self, request, *how)

    patch.setattr(Scheduler, "add", add)


def give_all_samples_one_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(intake, "sample_seed", lambda seed, index: seed)


def spend_over_budget(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._admit

    def admit(self: Scheduler, plan: object, planned: object, budget: int, bar: float) -> None:
        real(self, plan, planned, budget and budget + 1, bar)

    patch.setattr(Scheduler, "_admit", admit)


DEFECTS = [
    Defect(
        forget_a_reference,
        "was released more often than it was taken",
        "was released more often than it was taken",
    ),
    Defect(forget_to_release, "references are the tables that name a block", "nothing is held at the end"),
    Defect(reuse_blocks_of_a_step_in_flight, "a row runs once in a plan", "is given away while step"),
    Defect(skip_the_salt, "tenants share no block", None),
    Defect(hash_a_partial_block, "an identity is that of a full block", "while step 2 still writes them"),
    Defect(publish_before_computed, "what is offered is computed", "while step 4 still writes them"),
    Defect(
        keep_the_identity_of_a_block_taken_again,
        "tenants share no block",
        "tokens are those of the request alone",
    ),
    Defect(
        let_groups_share_identities,
        "an identity is that of a full block",
        "tokens are those of the request alone",
    ),
    Defect(resume_one_position_late, "positions 6 to 5 were asked for", "positions 6 to 5 were asked for"),
    Defect(resume_without_the_last_token, "a start carries all tokens", "positions 5 to 5 were asked for"),
    Defect(
        resume_with_the_old_length,
        "a block holds what its identity says",
        "tokens are those of the request alone",
    ),
    Defect(
        lose_the_cancel_of_what_waits,
        "a cancelled sample ends in the next step",
        "a cancelled sample ends in the next step",
    ),
    Defect(
        drop_the_ending_of_the_preempted,
        "a cancelled sample ends in the next step",
        "a cancelled sample ends in the next step",
    ),
    Defect(end_twice, "nothing follows an ending", "nothing follows an ending"),
    Defect(forget_blocked_samples, "a step with work does some", "a step with work does some"),
    Defect(trim_the_window_a_block_early, "visible blocks are in the table", "is given blocks"),
    Defect(trim_by_what_is_scheduled, "is given blocks", "is given blocks"),
    Defect(see_one_position_too_few, "visible blocks are in the table", "and its table is"),
    Defect(adopt_the_whole_prompt, "positions 4 to 3 were asked for", "positions 4 to 3 were asked for"),
    Defect(preempt_the_first, "the last of the running is preempted", "list index out of range"),
    Defect(let_the_young_pass, "nobody starts while one who goes first waits", None),
    Defect(
        give_all_samples_one_seed,
        "tokens are those of the request alone",
        "tokens are those of the request alone",
    ),
    Defect(spend_over_budget, "the budget is kept", None),
]


def caught(*, watch: bool) -> str:
    """What the first history that shows a defect shows; nothing if none does."""
    for seed in SEEDS:
        try:
            play(draw_scenario(random.Random(seed)), watch=watch)
        except Exception as error:  # a defect may surface as anything; the caller states what it expects
            return str(error)
    return ""


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.plant.__name__)
def test_the_rules_catch_it(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    defect.plant(monkeypatch)
    assert defect.rule in caught(watch=True)


@pytest.mark.parametrize(
    "defect", [defect for defect in DEFECTS if defect.shows], ids=lambda defect: defect.plant.__name__
)
def test_the_outputs_betray_it(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    defect.plant(monkeypatch)
    assert str(defect.shows) in caught(watch=False)


def test_an_engine_without_a_defect_is_not_accused() -> None:
    for seed in range(120):
        play(draw_scenario(random.Random(seed)))
