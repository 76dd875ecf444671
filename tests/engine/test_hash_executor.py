"""The hash executor notices what it is there to notice, and takes the time that it is told to take."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_scenarios import EOS, VOCAB

from headrace.engine import (
    Engine,
    GroupSpec,
    KVCache,
    RowStart,
    ScheduledRow,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)
from headrace.protocol.requests import GenerateRequest, SamplingParams, sample_seed
from headrace.sim import run
from headrace.sim.hash_executor import HashExecutor, PlanError, hash_engine, model_of
from headrace.sim.hash_model import HashModel, expected, expected_tokens

SIZE = 4
GREEDY = SamplingParams(max_tokens=50, temperature=0.0)


def executor(depth: int = 1, groups: tuple[GroupSpec, ...] = (GroupSpec(),), **options: Any) -> HashExecutor:
    return HashExecutor(
        HashModel(VOCAB, groups=groups), num_blocks=20, block_size=SIZE, depth=depth, **options
    )


def start(tokens: list[int], row: int = 0, *tables: list[int]) -> RowStart:
    return RowStart(row, tokens, len(tokens), GREEDY, 0, None, list(tables) or [[]])


def whole(count: int, *blocks: list[int], row: int = 0, begin: int = 0) -> ScheduledRow:
    return ScheduledRow(row, begin, count, True, blocks or ([],))


def submit(*plans: StepPlan, on: HashExecutor | None = None) -> list[int]:
    """Run plans without waiting in between; the last one's tokens."""

    async def main() -> list[int]:
        target = on or executor()
        futures = [target.submit(plan) for plan in plans]
        results = [await future for future in futures]
        return [token for tokens in results[-1].tokens for token in tokens]

    return asyncio.run(main())


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PREFILL = StepPlan(0, [start(PROMPT)], [whole(9, [7, 2, 5])])
DECODE = StepPlan(1, [], [whole(1, begin=9)])


def test_its_tokens_are_the_expected_ones() -> None:
    request = GenerateRequest(request_id="", prompt=PROMPT, sampling=GREEDY)
    wanted = expected_tokens(request, 0, HashModel(VOCAB), 99)
    on = executor()
    assert submit(PREFILL, on=on) + submit(DECODE, on=on) == wanted[:2]


def test_chunks_and_blocks_make_no_difference() -> None:
    chunks = [
        StepPlan(0, [start(PROMPT)], [ScheduledRow(0, 0, 3, False, ([0],))]),
        StepPlan(1, [], [ScheduledRow(0, 3, 5, False, ([1],))]),
        StepPlan(2, [], [ScheduledRow(0, 8, 1, True, ([9],))]),
    ]
    assert submit(*chunks) == submit(PREFILL)


@pytest.mark.parametrize("block", [7, 2, 5])
@pytest.mark.parametrize("damage", ["stale", "unwritten", "swapped"])
def test_one_wrong_value_changes_what_follows(block: int, damage: str) -> None:
    good, bad = executor(), executor()
    fresh = executor().values
    submit(PREFILL, on=good)
    submit(PREFILL, on=bad)
    match damage:
        case "stale":
            bad.values[block, 0] ^= 1
        case "unwritten":
            bad.values[block] = fresh[block]
        case "swapped":
            bad.values[[block, (block + 1) % 20]] = bad.values[[(block + 1) % 20, block]]
    long = [StepPlan(n, [], [whole(1, begin=9 + n)]) for n in range(3)]
    assert [submit(step, on=good) for step in long] != [submit(step, on=bad) for step in long]


def test_blocks_in_another_order_are_another_context() -> None:
    on = executor()
    submit(PREFILL, on=on)
    values = [on.model.chain(0, 8, [5], on.values[table].reshape(-1).tolist()) for table in ([7, 2], [2, 7])]
    assert values[0] != values[1]


def test_a_window_sees_its_positions_and_nothing_else() -> None:
    model = HashModel(VOCAB, groups=(GroupSpec(window=3),))
    context = [11, 12]
    assert model.chain(0, 5, [1, 2, 3], context) != model.chain(0, 5, [1, 2, 3], [10, 12])
    whole_chain = model.chain(0, 0, [1, 2, 3, 4, 5, 6], [])
    assert model.chain(0, 4, [5, 6], whole_chain[2:4]) == whole_chain[4:]


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        ([StepPlan(0, [], [whole(1)])], "row 0 runs and was never started"),
        ([StepPlan(0, [start(PROMPT)], [whole(10, [1, 2, 3])])], "has 9 tokens, and positions 0 to 9"),
        ([StepPlan(0, [start(PROMPT)], [whole(0, [1, 2, 3])])], "positions 0 to -1"),
        ([StepPlan(0, [start(PROMPT)], [whole(8, [1, 2])])], "samples after position 7 of 9 tokens"),
        ([StepPlan(0, [start(PROMPT)], [whole(9, [1, 2])])], r"positions 0 to 8 of group 0, .* is \[1, 2\]"),
        ([StepPlan(0, [start(PROMPT, 0, [-1, 2])], [whole(1, [3], begin=8)])], r"is \[-1, 2, 3\]"),
    ],
)
def test_a_plan_that_cannot_be_run_is_an_error(plans: list[StepPlan], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        submit(*plans)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (
            StepPlan(1, [start(PROMPT)], [whole(9, [1, 3, 4])]),
            "row 0 is given away while step 0 still runs it",
        ),
        (
            StepPlan(1, [start(PROMPT, 1)], [whole(9, [1, 5, 4], row=1)]),
            r"is given blocks \[5\] while step 0",
        ),
        (StepPlan(1, [start(PROMPT, 1, [7, 2])], [whole(1, [4], row=1, begin=8)]), r"reads blocks \[2, 7\]"),
    ],
)
def test_what_a_step_in_flight_names_may_not_be_given_away(second: StepPlan, reason: str) -> None:
    submit(PREFILL, StepPlan(1, [start(PROMPT, 1)], [whole(9, [1, 3, 4], row=1)]), on=executor(depth=2))
    with pytest.raises(PlanError, match=reason):
        submit(PREFILL, second, on=executor(depth=2))


def test_min_tokens_holds_every_stop_token_back() -> None:
    model = HashModel(VOCAB, EOS)
    stops = tuple(range(2, VOCAB - 2))
    for ignore_eos, least in ((False, 9), (True, 9), (False, 0)):
        params = SamplingParams(
            max_tokens=12, min_tokens=least, ignore_eos=ignore_eos, stop_token_ids=stops, seed=5
        )
        got = expected_tokens(GenerateRequest(request_id="", prompt=[2], sampling=params), 0, model, 99)
        held_back = set(stops) | (set() if ignore_eos else EOS)
        assert not held_back & set(got[:least])
        assert len(got) >= least and (len(got) < 12 or got[-1] not in held_back)


def test_the_seed_matters_above_a_temperature_of_zero() -> None:
    def tokens(temperature: float, seed: int, index: int = 0) -> list[int]:
        params = SamplingParams(max_tokens=8, temperature=temperature, seed=seed, n=2)
        return expected_tokens(
            GenerateRequest(request_id="", prompt=[2, 3], sampling=params), index, HashModel(VOCAB), 99
        )

    assert tokens(0.0, 1) == tokens(0.0, 2, index=1)
    assert tokens(1.0, 1) != tokens(1.0, 2)
    assert tokens(1.0, 1, index=1) == tokens(1.0, sample_seed(1, 1))


def test_expected_says_what_is_reported_of_every_position() -> None:
    params = SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=0, n=2, ignore_eos=True)
    request = GenerateRequest(request_id="", prompt=PROMPT, sampling=params)
    first, second = (expected(request, index, HashModel(VOCAB), 12) for index in (0, 1))
    assert len(first.tokens) == 3, "the context ends it"
    assert first.logprobs is not None and first.prompt_logprobs is not None
    assert [entry.token for entry in first.logprobs] == first.tokens
    assert [entry.token for entry in first.prompt_logprobs] == PROMPT[1:] and second.prompt_logprobs is None
    assert {len(entry.top) for entry in first.logprobs} == {2}


# ---- the whole engine on it, in both worlds ------------------------------------------------------------


def config(depth: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=64, vocab_size=VOCAB, max_num_seqs=4, max_num_batched_tokens=16, steps_in_flight=depth
    )


async def serve(engine: Engine, requests: list[GenerateRequest]) -> tuple[list[list[int]], float]:
    """Tokens of each request, and the seconds of the running loop that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in await engine.step():
            tokens[output.request_id] += output.tokens
    return list(tokens.values()), loop.time() - began


REQUESTS = [
    GenerateRequest(
        request_id=f"r{i}", prompt=PROMPT[: 3 + i], sampling=SamplingParams(max_tokens=10, ignore_eos=True)
    )
    for i in range(5)
]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_real_and_virtual_time_give_the_same_tokens(depth: int) -> None:
    async def main(*_: object) -> tuple[list[list[int]], float]:
        return await serve(hash_engine(config(depth), num_blocks=30, block_size=SIZE), REQUESTS)

    model = model_of(hash_engine(config(depth), num_blocks=30))
    wanted = [expected_tokens(request, 0, model, 64) for request in REQUESTS]
    real, virtual = asyncio.run(main())[0], run(main, seed=1).result[0]
    assert real == virtual == wanted


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_take_their_modelled_time_one_after_another(depth: int) -> None:
    async def main(*_: object) -> tuple[float, list[int]]:
        engine = hash_engine(config(depth), num_blocks=30, block_size=SIZE, step_s=1.0, token_s=0.25)
        sizes: list[int] = []
        submit_plan = engine.executor.submit

        def counted(plan: StepPlan) -> Any:
            sizes.append(plan.tokens)
            return submit_plan(plan)

        engine.executor.submit = counted  # type: ignore[method-assign]
        _, seconds = await serve(engine, REQUESTS)
        return seconds, sizes

    seconds, sizes = run(main, seed=1).result
    assert seconds == pytest.approx(sum(1.0 + 0.25 * size for size in sizes))


def test_a_cancelled_step_is_waited_for_by_the_next_call() -> None:
    async def main(*_: object) -> list[int]:
        engine = hash_engine(config(2), num_blocks=30, block_size=SIZE, step_s=1.0)
        engine.add(REQUESTS[0])
        tokens: list[int] = []
        while engine.has_work:
            try:
                outputs = await asyncio.wait_for(engine.step(), timeout=0.3)
            except TimeoutError:
                continue
            tokens += [token for output in outputs for token in output.tokens]
        return tokens

    assert run(main, seed=1).result == expected_tokens(REQUESTS[0], 0, HashModel(VOCAB), 64)


def test_an_executor_deeper_than_the_scheduler_reckons_with_is_refused() -> None:
    scheduler = Scheduler(config(1), KVCache(num_blocks=4, block_size=SIZE))
    with pytest.raises(ValueError, match="keeps 2 steps in flight and the scheduler reckons with 1"):
        Engine(scheduler, executor(depth=2))
    with pytest.raises(ValueError, match="depth must be at least 1"):
        executor(depth=0)


def test_what_the_executor_raises_ends_the_step_and_is_raised_again() -> None:
    class Broken(HashExecutor):
        def submit(self, plan: StepPlan) -> Any:
            future = super().submit(plan)
            broken = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: broken.set_exception(OSError("the device is gone")))
            return broken

    async def main() -> None:
        cache = KVCache(num_blocks=4, block_size=SIZE)
        engine = Engine(Scheduler(config(1), cache), Broken(HashModel(VOCAB), num_blocks=4, block_size=SIZE))
        engine.add(REQUESTS[0])
        for _ in range(2):
            with pytest.raises(OSError, match="the device is gone"):
                await engine.step()

    asyncio.run(main())


def test_closing_voids_what_is_in_flight() -> None:
    async def main() -> None:
        target = executor(depth=2)
        future = target.submit(PREFILL)
        target.close()
        await asyncio.sleep(0)
        assert future.cancelled()

    asyncio.run(main())
