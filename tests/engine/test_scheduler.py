"""How the scheduler behaves, one behaviour a test, on plans made by hand: no executor, every token is 9."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.engine import GroupSpec, KVCache, Scheduler, SchedulerConfig, StepPlan, StepResult
from headrace.engine.sequence import Sequence, State
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    RequestError,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)

SIZE = 4


def scheduler(
    num_blocks: int = 100, groups: tuple[GroupSpec, ...] = (GroupSpec(),), **limits: Any
) -> Scheduler:
    defaults: dict[str, Any] = {"max_model_len": 100, "vocab_size": 50, "max_num_seqs": 4}
    config = SchedulerConfig(**{**defaults, "max_num_batched_tokens": 16, **limits})
    return Scheduler(config, KVCache(num_blocks=num_blocks, block_size=SIZE, groups=groups))


def request(
    name: str, prompt: list[int], *, priority: int = 0, salt: str = "", **params: Any
) -> GenerateRequest:
    sampling = SamplingParams(**{"max_tokens": 20, **params})
    return GenerateRequest(
        request_id=name, prompt=prompt, priority=priority, cache_salt=salt, sampling=sampling
    )


def answer(plan: StepPlan, token: int = 9) -> StepResult:
    return StepResult(tokens=[[token] if row.sample else [] for row in plan.rows])


def plan(s: Scheduler) -> StepPlan:
    made = s.schedule()
    assert made is not None
    return made


def step(s: Scheduler) -> list[tuple[int, int, bool]]:
    """Run one step; what each of its rows computed: (start, count, whether it sampled)."""
    made = plan(s)
    s.commit(made, answer(made))
    s.cache.pool.check()
    return [(row.start, row.count, row.sample) for row in made.rows]


def find(s: Scheduler, name: str, index: int = 0) -> Sequence:
    return next(q for q in s.sequences() if (q.request.request_id, q.index) == (name, index))


def endings(outputs: list[SequenceOutput]) -> list[tuple[str, int, FinishReason]]:
    return [(o.request_id, o.index, o.finish.reason) for o in outputs if o.finish is not None]


def tokens(length: int, first: int = 10) -> list[int]:
    return [first + j % 30 for j in range(length)]


# ---- what a step computes ------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_those_that_decode() -> None:
    s = scheduler(max_num_batched_tokens=8)
    s.add(request("short", tokens(3)))
    s.add(request("long", tokens(14, first=11)))
    assert step(s) == [(0, 3, True), (0, 5, False)]
    assert step(s) == [(3, 1, True), (5, 7, False)]
    assert step(s) == [(4, 1, True), (12, 2, True)]
    assert step(s) == [(5, 1, True), (14, 1, True)]


def test_the_last_token_is_not_computed() -> None:
    s = scheduler()
    s.add(request("a", tokens(5), max_tokens=2))
    assert step(s) == [(0, 5, True)]
    assert step(s) == [(5, 1, True)]
    assert s.schedule() is None
    assert endings(s.take_outputs()) == [("a", 0, FinishReason.LENGTH)]


def test_the_context_ends_a_sequence_before_max_tokens_does() -> None:
    s = scheduler(max_model_len=7)
    s.add(request("a", tokens(5)))
    assert [step(s), step(s)] == [[(0, 5, True)], [(5, 1, True)]]
    assert endings(s.take_outputs()) == [("a", 0, FinishReason.LENGTH)] and not s.has_work


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"stop_token_ids": (9,)}, FinishReason.STOP),
        ({"ignore_eos": False}, FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 1}, FinishReason.LENGTH),
        ({"ignore_eos": True, "max_tokens": 1, "stop_token_ids": (9,)}, FinishReason.STOP),
    ],
)
def test_a_stop_token_ends_a_sequence_and_is_its_last(params: dict[str, Any], reason: FinishReason) -> None:
    s = scheduler(eos_token_ids=frozenset({9} if "ignore_eos" in params else ()))
    s.add(request("a", tokens(5), **params))
    step(s)
    (output,) = s.take_outputs()
    assert output.tokens == [9] and output.finish is not None and output.finish.reason is reason
    assert output.finish.stop_token == (9 if reason is FinishReason.STOP else None)


def test_several_tokens_of_one_step_count_up_to_the_one_that_ends() -> None:
    """As when drafts were accepted."""
    s = scheduler()
    s.add(request("a", tokens(5), stop_token_ids=(3,)))
    s.commit(plan(s), StepResult(tokens=[[1, 2, 3, 4]]))
    (output,) = s.take_outputs()
    assert output.tokens == [1, 2, 3] and endings([output]) == [("a", 0, FinishReason.STOP)]


def test_a_sequence_without_a_choice_ends_alone_and_leaves_nothing_in_the_cache() -> None:
    s = scheduler()
    s.add(request("bad", tokens(9)))
    s.add(request("good", tokens(9, first=20)))
    made = plan(s)
    error = RequestError(ErrorCode.INTERNAL, "not finite")
    s.commit(made, StepResult(tokens=[[], [9]], failed={0: error}))
    bad, good = s.take_outputs()
    assert bad.finish == Finish(FinishReason.ERROR, error=error) and good.tokens == [9]
    s.cache.pool.check()
    assert s.cache.pool.held == len(find(s, "good").tables[0])
    s.add(request("again", tokens(9)))
    assert plan(s).rows[1].start == 0, "what it wrote was given to another"


# ---- the prefix cache ----------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    s = scheduler()
    s.add(request("first", tokens(11), max_tokens=1))
    step(s)
    s.add(request("same start", [*tokens(9), 1, 2, 3]))
    made = plan(s)
    assert [(row.start, row.count) for row in made.rows] == [(8, 4)]
    assert made.starts[0].tables == [[0, 1]], "two blocks of the first; its third is not full"
    s.commit(made, answer(made))
    assert [o.cached_tokens for o in s.take_outputs()] == [0, 8]
    assert (s.counters.prefix_queries, s.counters.prefix_hits) == (23, 8)


def test_what_is_found_need_not_fit_a_second_time() -> None:
    s = scheduler(num_blocks=13, max_num_batched_tokens=64)
    s.add(request("a", tokens(41)))
    step(s)
    s.add(request("b", tokens(41)))
    assert step(s) == [(41, 1, True), (40, 1, True)], "eleven blocks are held, and two are enough for b"


def test_of_a_prompt_that_is_all_known_the_last_block_is_computed_again() -> None:
    """Its last position's logits are wanted, and a block that others hold is never written."""
    s = scheduler()
    s.add(request("first", tokens(8), max_tokens=1))
    step(s)
    s.add(request("again", tokens(8)))
    assert step(s) == [(4, 4, True)]


def test_tenants_do_not_meet_in_the_cache() -> None:
    s = scheduler()
    s.add(request("first", tokens(9), max_tokens=1, salt="a"))
    step(s)
    s.add(request("other tenant", tokens(9), max_tokens=1, salt="b"))
    assert step(s) == [(0, 9, True)]
    s.add(request("same tenant", tokens(9), max_tokens=1, salt="a"))
    assert step(s) == [(8, 1, True)]


def test_without_prefix_reuse_requests_share_nothing_but_samples_of_one_still_do() -> None:
    s = scheduler(reuse_prefix=False)
    s.add(request("first", tokens(9), max_tokens=1))
    step(s)
    s.add(request("second", tokens(9), max_tokens=2, n=2))
    assert step(s) == [(0, 9, True)]
    assert step(s) == [(9, 1, True), (8, 1, True)]


def test_three_samples_share_the_blocks_of_the_prompt() -> None:
    s = scheduler()
    s.add(request("a", tokens(10), n=3))
    assert [q.state for q in s.sequences()] == [State.WAITING, State.BLOCKED, State.BLOCKED]
    assert step(s) == [(0, 10, True)]
    assert step(s) == [(10, 1, True), (8, 2, True), (8, 2, True)]
    tables = [q.tables[0] for q in s.sequences()]
    assert [table[:2] for table in tables] == [tables[0][:2]] * 3
    references = s.cache.pool.references
    assert [references(block) for block in tables[0][:2]] == [3, 3], "two full blocks, held by all"
    assert [references(table[2]) for table in tables] == [1, 1, 1], "what is written is one's own"
    s.cancel("a", 0)
    assert [references(block) for block in tables[1][:2]] == [2, 2]
    s.cancel("a")
    assert s.cache.pool.held == 0


def test_samples_are_let_go_when_the_first_ends_early() -> None:
    s = scheduler()
    s.add(request("a", tokens(10), n=3))
    s.cancel("a", 0)
    assert step(s) == [(0, 10, True), (0, 6, False)], "the other two now compute the prompt themselves"


def test_a_window_gives_back_the_blocks_that_it_has_passed() -> None:
    s = scheduler(groups=(GroupSpec(), GroupSpec(window=5)))
    s.add(request("a", tokens(14)))
    step(s)
    full, sliding = find(s, "a").tables
    assert -1 not in full and [block >= 0 for block in sliding] == [False, False, True, True]
    assert s.cache.pool.held == 6 and s.cache.pool.cached == 2, "passed blocks can still be found"
    s.add(request("b", [*tokens(8), 1]))
    assert plan(s).rows[-1].start == 8, "and so another can continue from there"


# ---- when blocks run out -------------------------------------------------------------------------------


def test_the_last_in_rank_gives_up_its_blocks_and_is_computed_again() -> None:
    s = scheduler(num_blocks=5)
    s.add(request("a", tokens(7), max_tokens=6))
    s.add(request("b", tokens(7, first=20)))
    assert step(s) == [(0, 7, True), (0, 7, True)]
    assert step(s) == [(7, 1, True), (7, 1, True)]
    assert step(s) == [(8, 1, True)], "a takes the fifth block, and b has none"
    b = find(s, "b")
    assert b.state is State.WAITING and b.row is None and b.tables == [] and s.counters.preemptions == 1
    assert [step(s) for _ in range(3)] == [[(9, 1, True)], [(10, 1, True)], [(11, 1, True)]]
    made = plan(s)
    assert made.starts[0].tokens == [*tokens(7, first=20), 9, 9], "what it had said stays said"
    assert [(row.start, row.count, row.sample) for row in made.rows] == [(8, 1, True)], (
        "nobody took its blocks"
    )
    s.commit(made, answer(made))
    assert [len(o.tokens) for o in s.take_outputs() if o.request_id == "b"] == [1, 1, 1]


def test_a_sequence_alone_that_outgrows_the_cache_ends_with_the_limit() -> None:
    s = scheduler(num_blocks=2)
    s.add(request("a", tokens(7)))
    assert [step(s), step(s), s.schedule()] == [[(0, 7, True)], [(7, 1, True)], None]
    *said, last = s.take_outputs()
    assert [o.tokens for o in said] == [[9], [9]]
    assert last.finish is not None and last.finish.error is not None
    assert last.finish.error.code is ErrorCode.OUT_OF_BLOCKS
    assert "after 2 output tokens" in last.finish.error.message and "2 blocks" in last.finish.error.message
    assert s.cache.pool.held == 0 and not s.has_work


def test_it_ends_so_too_when_all_its_blocks_are_found_again_and_one_lacks() -> None:
    s = scheduler(num_blocks=2)
    s.add(request("a", tokens(7), priority=1))
    step(s)
    s.add(request("urgent", tokens(2, first=30)))
    step(s)
    assert find(s, "a").state is State.WAITING and len(find(s, "a").tokens) == 9
    s.cancel("urgent")
    assert s.schedule() is None
    assert endings(s.take_outputs()[-1:]) == [("a", 0, FinishReason.ERROR)]


def test_what_can_never_fit_is_refused_at_once() -> None:
    s = scheduler(num_blocks=2)
    s.add(request("a", tokens(9)))
    (output,) = s.take_outputs()
    assert output.finish is not None and output.finish.error is not None
    assert output.finish.error.code is ErrorCode.INVALID and output.finish.error.field == "prompt"
    assert "needs 3 KV blocks and the cache has 2" in output.finish.error.message
    assert not s.has_work


def test_chunks_shrink_where_a_window_needs_few_blocks_but_a_whole_chunk_needs_many() -> None:
    s = scheduler(num_blocks=2, groups=(GroupSpec(window=4),), max_num_batched_tokens=64)
    s.add(request("a", tokens(19)))
    assert step(s) == [(0, 8, False)]
    assert step(s) == [(8, 4, False)], "the first block is back"
    assert [step(s), step(s)] == [[(12, 4, False)], [(16, 3, True)]]


def test_a_preempted_sequence_that_would_fit_alone_is_not_ended_for_lack_of_blocks() -> None:
    """Resumed, it wants in one chunk what it first computed token by token."""
    s = scheduler(num_blocks=3, groups=(GroupSpec(window=4),), max_num_batched_tokens=64)
    s.add(request("a", tokens(3), max_tokens=40))
    for _ in range(20):
        step(s)
    s.add(request("urgent", tokens(12, first=20), priority=-1, max_tokens=1))
    step(s)
    assert find(s, "a").state is State.WAITING
    while s.has_work:
        step(s)
        outputs = s.take_outputs()
    assert endings(outputs) == [("a", 0, FinishReason.LENGTH)]


def test_prompt_logprobs_come_once_and_whole_though_a_preemption_interrupts_the_prompt() -> None:
    s = scheduler(num_blocks=8, max_num_batched_tokens=8)

    def run_step() -> list[SequenceOutput]:
        made = plan(s)
        result = answer(made)
        for i, row in enumerate(made.rows):
            if (start := asks.get(row.row)) is not None:
                known = range(row.start + 1, min(row.start + row.count + 1, start))
                result.prompt_logprobs[i] = [TokenLogprobs(p, 0.0, 1, []) for p in known]
        s.commit(made, result)
        return s.take_outputs()

    asks: dict[int, int] = {}
    s.add(request("a", tokens(20), prompt_logprobs=0, max_tokens=1))
    asks[plan_row(s, "a")] = 20
    run_step()
    s.add(request("urgent", tokens(24, first=20), priority=-1, max_tokens=1))
    run_step()
    assert find(s, "a").state is State.WAITING
    outputs: list[SequenceOutput] = []
    while s.has_work:
        outputs += run_step()
    (mine,) = (o for o in outputs if o.request_id == "a")
    assert mine.prompt_logprobs is not None
    assert [entry.token for entry in mine.prompt_logprobs] == list(range(1, 20))
    assert mine.cached_tokens == 0, "its own blocks are not read: every position is computed"


def plan_row(s: Scheduler, name: str) -> int:
    """The row that the only waiting sequence will get: rows are given lowest first."""
    assert s.num_running == 0 and find(s, name).state is State.WAITING
    return 0


# ---- who goes first ------------------------------------------------------------------------------------


def test_the_more_urgent_start_first_and_take_rows_from_the_less_urgent() -> None:
    s = scheduler(max_num_seqs=2)
    for name, priority in (("low", 5), ("middle", 3), ("high", 1)):
        s.add(request(name, tokens(3), priority=priority))
    step(s)
    assert [q.request.request_id for q in s.sequences() if q.state is State.RUNNING] == ["middle", "high"]
    s.add(request("highest", tokens(3), priority=0))
    assert len(step(s)) == 2, "middle runs a last time"
    step(s)
    assert [q.request.request_id for q in s.sequences() if q.state is State.RUNNING] == ["high", "highest"]
    s.add(request("as high", tokens(3), priority=1))
    step(s)
    assert find(s, "as high").state is State.WAITING, "an equal waits its turn"


def test_a_long_prompt_yields_the_budget_to_one_more_urgent() -> None:
    s = scheduler(max_num_batched_tokens=8)
    s.add(request("long", tokens(40), priority=1))
    assert step(s) == [(0, 8, False)]
    s.add(request("urgent", tokens(6, first=20), priority=0))
    s.add(request("as long", tokens(6, first=1), priority=1))
    assert step(s) == [(8, 1, False), (0, 6, True)], "what is left does not go to an equal of long"
    assert step(s) == [(6, 1, True), (9, 7, False)]


def test_nobody_passes_one_of_equal_urgency_that_does_not_fit_yet() -> None:
    s = scheduler(num_blocks=10)
    s.add(request("a", tokens(8), max_tokens=4))
    step(s)
    s.add(request("big", tokens(30, first=3)))
    s.add(request("small", tokens(2, first=1)))
    for _ in range(3):
        assert len(step(s)) == 1, "small would fit, and waits behind big"
    step(s)
    assert find(s, "big").state is State.RUNNING
    assert s.num_waiting == 1


def test_one_that_does_not_fit_is_looked_up_again_only_when_something_came_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[str] = []
    match = KVCache.match

    def counted(self: KVCache, sequence: Sequence) -> Any:
        looked.append(sequence.request.request_id)
        return match(self, sequence)

    monkeypatch.setattr(KVCache, "match", counted)
    s = scheduler(num_blocks=10)
    s.add(request("a", tokens(8), max_tokens=4))
    s.add(request("big", tokens(30, first=3)))
    assert looked == ["a", "big"]  # what each will have to compute is foreseen as it comes
    looked.clear()
    while find(s, "big").state is State.WAITING:
        step(s)
    assert looked == ["a", "big", "big"]


def test_what_is_queued_counts_prompt_tokens_that_the_cache_does_not_have() -> None:
    s = scheduler(num_blocks=40)
    s.add(request("a", tokens(8), max_tokens=4))
    assert s.queued_tokens == 8
    while not s.is_empty:
        step(s)
        s.take_outputs()
    assert s.queued_tokens == 0
    s.add(request("again", [*tokens(8), *tokens(9, first=12)]))
    assert s.queued_tokens == 9
    s.add(request("other", tokens(5, first=15)))
    assert s.queued_tokens == 14
    s.cancel("other")
    assert s.queued_tokens == 9


# ---- several steps in flight ---------------------------------------------------------------------------


def test_a_token_being_sampled_is_a_placeholder_of_the_next_step() -> None:
    s = scheduler(steps_in_flight=2)
    s.add(request("a", tokens(5), max_tokens=3))
    first, second = plan(s), plan(s)
    assert [(r.start, r.count, r.sample) for r in first.rows + second.rows] == [(0, 5, True), (5, 1, True)]
    assert find(s, "a").pending == 2 and len(find(s, "a").tokens) == 5
    s.commit(first, answer(first, 1))
    third = plan(s)
    assert [(r.start, r.count, r.sample) for r in third.rows] == [(6, 1, True)]
    assert s.schedule() is None, "the third token is the last, and is never computed"
    s.commit(second, answer(second, 2))
    s.commit(third, answer(third, 3))
    assert [o.tokens for o in s.take_outputs()] == [[1], [2], [3]]


def test_what_has_ended_keeps_row_and_blocks_while_a_step_in_flight_names_it() -> None:
    s = scheduler(steps_in_flight=2, max_num_seqs=1)
    s.add(request("a", tokens(5), stop_token_ids=(9,)))
    s.add(request("b", tokens(5)))
    first, second = plan(s), plan(s)
    s.commit(first, answer(first))
    assert endings(s.take_outputs()) == [("a", 0, FinishReason.STOP)]
    assert s.cache.pool.held == 2 and s.schedule() is None, "b has no row yet"
    s.commit(second, answer(second))
    assert s.take_outputs() == [] and s.cache.pool.held == 0
    assert [start.row for start in plan(s).starts] == [0]


def test_nobody_is_preempted_for_blocks_that_are_on_their_way() -> None:
    s = scheduler(num_blocks=8, steps_in_flight=2, max_num_batched_tokens=64)
    s.add(request("a", tokens(8)))
    s.add(request("b", tokens(8, first=20)))
    s.add(request("c", tokens(4, first=30), stop_token_ids=(3,)))
    in_flight = [plan(s), plan(s)]
    for token in (9, 9, 9, 3):
        done = in_flight.pop(0)
        s.commit(done, answer(done, token))
        if token != 3:
            in_flight.append(plan(s))
    assert s.cache.pool.available == 0 and s.schedule() is None, "a needs a block, and c's are about to come"
    assert s.counters.preemptions == 0
    s.commit(in_flight[0], answer(in_flight[0]))
    assert [row.start for row in plan(s).rows] == [12, 12]


def test_one_victim_is_enough_while_its_blocks_are_on_their_way() -> None:
    s = scheduler(num_blocks=7, steps_in_flight=2)
    for name in ("low", "lower"):
        s.add(request(name, tokens(6, first=ord(name[-1]) % 20), priority=1 + len(name)))
    first = plan(s)
    s.add(request("urgent", tokens(9, first=30)))
    second = plan(s)
    assert [find(s, name).state for name in ("low", "lower")] == [State.RUNNING, State.WAITING]
    for made in (first, second):
        s.commit(made, answer(made))
    assert [start.tokens for start in plan(s).starts] == [tokens(9, first=30)]


def test_a_cancel_takes_effect_at_once_wherever_its_sequence_is() -> None:
    s = scheduler(steps_in_flight=2, max_num_seqs=2)
    for name, n in (("in flight", 1), ("samples", 3), ("waiting", 1)):
        s.add(request(name, tokens(6), n=n))
    made = plan(s)
    for name in ("in flight", "samples", "waiting"):
        s.cancel(name)
    s.cancel("waiting")
    s.cancel("unknown")
    ended = endings(s.take_outputs())
    assert len(ended) == 5 and {reason for _, _, reason in ended} == {FinishReason.CANCELLED}
    assert (s.num_running, s.num_waiting) == (0, 0) and s.schedule() is None
    s.commit(made, answer(made))
    assert s.take_outputs() == [] and s.cache.pool.held == 0


# ---- limits --------------------------------------------------------------------------------------------


def test_a_full_queue_refuses() -> None:
    s = scheduler(max_num_seqs=2, max_waiting=1)
    s.add(request("a", tokens(3), n=2))
    s.add(request("b", tokens(3)))
    s.add(request("c", tokens(3)))
    (output,) = s.take_outputs()
    assert output.request_id == "c" and output.finish is not None and output.finish.error is not None
    assert (
        output.finish.error.code is ErrorCode.OVERLOADED and "the limit is 3" in output.finish.error.message
    )


def test_a_refused_number_of_samples_does_not_decide_how_many_endings_are_made() -> None:
    s = scheduler()
    s.add(request("a", tokens(3), n=10**12))
    assert len(s.take_outputs()) == 64


def test_clients_that_come_and_go_behind_one_that_waits_leave_nothing_behind() -> None:
    s = scheduler(max_num_seqs=1)
    s.add(request("runs", tokens(3)))
    step(s)
    s.add(request("waits", tokens(3)))
    for i in range(1000):
        s.add(request(f"r{i}", tokens(3)))
        s.cancel(f"r{i}")
    assert s.num_waiting == 1 and len(s._waiting._heap) < 100


def test_held_tokens_counts_the_positions_that_blocks_carry() -> None:
    s = scheduler(groups=(GroupSpec(), GroupSpec(window=5)))
    s.add(request("a", tokens(10), n=2))
    step(s)
    step(s)
    own = {block for q in s.sequences() for table in q.tables for block in table if block >= 0}
    a, b = s.sequences()
    assert (a.computed, b.computed) == (11, 10)
    shared = 2 * 8 - 4  # two blocks of full attention and, of the window's, one that both have not passed
    assert len(own) == s.cache.pool.held and s.held_tokens == shared + 2 * (3 + 2)


def test_an_id_in_use_is_the_callers_mistake() -> None:
    s = scheduler()
    s.add(request("a", tokens(3)))
    with pytest.raises(ValueError, match="'a' is in use"):
        s.add(request("a", tokens(3)))


def test_a_budget_that_cannot_advance_every_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(3\) must be at least max_num_seqs \(4\)"):
        scheduler(max_num_batched_tokens=3)
    with pytest.raises(ValueError, match="steps_in_flight must be at least 1, got 0"):
        scheduler(steps_in_flight=0)
