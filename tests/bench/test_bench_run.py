"""The run in virtual time: what is sent when, what is never exceeded, and what becomes of what fails."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from api_house import TEMPLATE, byte_tokenizer
from house import EngineShape

from headrace.bench.arrivals import Rate, arrivals
from headrace.bench.errors import FailureKind, RequestFailed
from headrace.bench.inprocess import EngineTarget
from headrace.bench.record import Record
from headrace.bench.run import Load, Run
from headrace.bench.target import Answer, Target, Turn
from headrace.bench.workload import (
    ConversationWorkload,
    Form,
    Lengths,
    RandomWorkload,
    Stream,
    Vocabulary,
    Workload,
    generator,
)
from headrace.sim import Simulation, run
from headrace.text import ChatTemplate


def now() -> float:
    return asyncio.get_running_loop().time()


class TimedTarget(Target):
    """Answers after `first_s`, with a token every `gap_s`. Fails requests whose number is in `failing`."""

    name = "timed"

    def __init__(
        self, first_s: float = 0.0, gap_s: float = 0.0, failing: frozenset[int] = frozenset()
    ) -> None:
        self.first_s, self.gap_s, self.failing = first_s, gap_s, failing
        self.running = self.most_running = 0
        self.turns: list[Turn] = []

    async def send(self, turn: Turn, record: Record) -> Answer:
        record.sent_s = now()
        self.turns.append(turn)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.first_s)
            if record.number in self.failing:
                raise RequestFailed(FailureKind.HTTP, "no", status=503)
            for i in range(turn.max_tokens or 1):
                if i:
                    await asyncio.sleep(self.gap_s)
                record.times.append(now())
                record.sizes.append(1)
                record.output_tokens += 1
            record.input_tokens = len(turn.prompt or ())
            return Answer(token_ids=[1] * record.output_tokens)
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass


def random_workload(seed: int = 0, output: int = 4) -> Workload:
    return RandomWorkload(seed, Form.TOKENS, Lengths(8), Lengths(output))


def poisson(rate: float, seed: int = 0) -> Callable[[], Iterator[float]]:
    return lambda: arrivals(Rate.constant(rate), 1.0, generator(seed, Stream.ARRIVALS))


def simulate(
    target: Target | Callable[[], Target],
    workload: Workload,
    load: Load,
    beside: Callable[[Run], Awaitable[None]] | None = None,
) -> Run:
    """A run in virtual time."""

    async def main(simulation: Simulation) -> Run:
        built = target if isinstance(target, Target) else target()
        it = Run(built, workload, load, now=now, cpu_clock=lambda: 0.0)
        other = asyncio.ensure_future(beside(it)) if beside else None
        await it.run()
        if other:
            await other
        await built.close()
        return it

    return run(main, seed=0, max_virtual_s=100_000.0).result


def test_an_open_loop_sends_on_time_however_slow_the_answers() -> None:
    it = simulate(TimedTarget(first_s=50.0), random_workload(), Load(poisson(5.0), requests=200))
    expected = list(itertools.islice(poisson(5.0)(), 200))
    assert [record.sent_s for record in it.records] == pytest.approx(expected)
    assert max(abs(record.lag_s or 0) for record in it.records) < 1e-9
    assert it.most_running > 150
    assert all(record.completed for record in it.records)


def test_a_closed_loop_has_as_many_under_way_as_asked_and_never_more() -> None:
    target = TimedTarget(first_s=0.7, gap_s=0.1)
    it = simulate(target, random_workload(), Load(None, concurrency=5, requests=42))
    assert target.most_running == it.most_running == 5
    assert len(it.records) == 42
    starts = [record.sent_s for record in it.records]
    assert starts == pytest.approx([k // 5 for k in range(42)])  # 0.7 + 3 * 0.1 each
    assert it.elapsed_s == pytest.approx(9.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_limit_holds_back_what_a_rate_would_send(seed: int) -> None:
    target = TimedTarget(first_s=1.0)
    it = simulate(target, random_workload(), Load(poisson(10.0, seed), concurrency=4, requests=60))
    assert target.most_running == 4
    ends = sorted(record.ended_s or 0 for record in it.records)
    for number, record in enumerate(it.records):
        free_s = ends[number - 4] if number >= 4 else 0.0
        assert record.ready_s == pytest.approx(max(record.due_s, free_s))
        assert record.sent_s == pytest.approx(record.ready_s)
    assert it.records[-1].ready_s - it.records[-1].due_s > 5


def test_nothing_is_sent_after_the_duration() -> None:
    for load in (Load(poisson(5.0), duration_s=10.0), Load(None, concurrency=3, duration_s=10.0)):
        it = simulate(TimedTarget(first_s=0.9), random_workload(output=1), load)
        sent = [record.sent_s or 0 for record in it.records]
        assert 30 < len(sent) < 80
        assert max(sent) < 10.0
        assert all(record.completed for record in it.records)


def test_sessions_think_and_do_not_pass_their_limit() -> None:
    workload = ConversationWorkload(1, Form.TOKENS, Lengths(5), Lengths(2), 3, think_s=2.0)
    target = TimedTarget(first_s=0.5)
    it = simulate(target, workload, Load(None, concurrency=2, requests=20))
    assert len(it.records) == 20
    by_session: dict[int, list[Record]] = {}
    for record in it.records:
        by_session.setdefault(record.session, []).append(record)
    assert [len(records) for records in by_session.values()] == [3] * 6 + [2]
    for records in by_session.values():
        assert [record.turn for record in records] == list(range(len(records)))
        for before, after in itertools.pairwise(records):
            turn = target.turns[after.number]
            assert after.sent_s == pytest.approx((before.ended_s or 0) + turn.think_s)
    spans = [(r[0].sent_s or 0, r[-1].ended_s or 0) for r in by_session.values()]
    for at, _ in spans:
        assert sum(begin <= at < end for begin, end in spans) <= 2


def test_a_failed_turn_ends_its_session_and_is_counted() -> None:
    workload = ConversationWorkload(1, Form.TOKENS, Lengths(5), Lengths(2), 4, think_s=0.0)
    it = simulate(
        TimedTarget(first_s=1.0, failing=frozenset({0})), workload, Load(None, concurrency=1, requests=8)
    )
    assert [record.session for record in it.records] == [0, 1, 1, 1, 1]
    failed = it.records[0].failure
    assert failed is not None and failed.kind == "http_503"
    assert (it.ended, it.failed, it.unsent) == (5, 1, 3)


def test_a_request_that_takes_too_long_is_given_up() -> None:
    target = TimedTarget(first_s=5.0)
    it = simulate(target, random_workload(), Load(None, concurrency=2, requests=4, timeout_s=2.0))
    kinds = [record.failure.kind for record in it.records if record.failure]
    assert kinds == [FailureKind.TIMEOUT] * 4
    assert it.elapsed_s == pytest.approx(4.0)
    assert target.running == 0


def test_a_stopped_run_returns_at_once_with_what_it_has() -> None:
    target = TimedTarget(first_s=1.0, gap_s=1.0)

    async def stop(it: Run) -> None:
        await asyncio.sleep(5.5)
        it.stop()

    it = simulate(target, random_workload(), Load(None, concurrency=2, requests=100), stop)
    assert it.interrupted
    assert it.elapsed_s == pytest.approx(5.5)
    assert [record.completed for record in it.records] == [True, True, False, False]
    assert [r.failure.kind for r in it.records if r.failure] == [FailureKind.CANCELLED] * 2
    assert len(it.records[2].times) == 1
    assert target.running == 0 and not it.under_way


def test_a_run_that_is_cancelled_from_outside_does_not_pretend_to_have_ended() -> None:
    async def main(simulation: Simulation) -> None:
        it = Run(TimedTarget(9.0), random_workload(), Load(None, concurrency=1, requests=5), now=now)
        task = asyncio.create_task(it.run())
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main, seed=0, max_virtual_s=100.0)


def test_a_defect_in_a_target_is_not_swallowed() -> None:
    class Broken(TimedTarget):
        async def send(self, turn: Turn, record: Record) -> Answer:
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        simulate(Broken(), random_workload(), Load(None, concurrency=1, requests=2))
    assert caught.group_contains(ZeroDivisionError)


def test_a_run_is_repeated_by_its_seed() -> None:
    def once(seed: int) -> tuple[list[float | None], list[object]]:
        target = TimedTarget(first_s=0.3)
        workload = ConversationWorkload(seed, Form.TOKENS, Lengths(6, 0.5), Lengths(3, 0.5), 3, 1.0)
        it = simulate(target, workload, Load(poisson(2.0, seed), requests=30))
        return [record.sent_s for record in it.records], [turn.prompt for turn in target.turns]

    assert once(7) == once(7)
    assert once(7)[0] != once(8)[0]
    assert once(7)[1] != once(8)[1]


# ---- an engine in this process -----------------------------------------------------------------------


def engine_target(**shape: object) -> EngineTarget:
    engine, _ = EngineShape(max_model_len=4096, num_blocks=2000, **shape).build()  # type: ignore[arg-type]
    return EngineTarget(engine, "hash", now=now, cpu_clock=lambda: 0.0)


def engine_workload(inputs: int, outputs: int, **options: object) -> Workload:
    return RandomWorkload(
        0,
        Form.TOKENS,
        Lengths(inputs),
        Lengths(outputs),
        Vocabulary(1000),
        **options,  # type: ignore[arg-type]
    )


def test_an_engines_latencies_are_its_steps() -> None:
    """A prompt of 150 tokens takes three steps of 64; each further token takes one."""
    it = simulate(
        lambda: engine_target(step_s=0.01), engine_workload(150, 5), Load(None, concurrency=1, requests=3)
    )
    for record in it.records:
        assert record.ttft_s == pytest.approx(0.03)
        assert record.tpot_s == pytest.approx(0.01)
        assert record.itl_s() == pytest.approx([0.01] * 4)
        assert record.e2e_s == pytest.approx(0.07)
        assert (record.input_tokens, record.output_tokens) == (150, 5)
    assert it.elapsed_s == pytest.approx(0.21)


def test_what_takes_the_place_of_an_ended_request_is_in_the_very_next_step() -> None:
    steps = itertools.count()

    def build() -> EngineTarget:
        target = engine_target()
        submit = target._engine.executor.submit

        def counted(plan):  # type: ignore[no-untyped-def]
            next(steps)
            return submit(plan)

        target._engine.executor.submit = counted  # type: ignore[method-assign]
        return target

    workload = RandomWorkload(0, Form.TOKENS, Lengths(4), Lengths(8, 0.5), Vocabulary(1000))
    it = simulate(build, workload, Load(None, concurrency=3, requests=30))
    free_at = [0, 0, 0]  # in steps: each request takes as many as it has tokens
    for record in it.records:
        free_at[free_at.index(min(free_at))] += record.output_tokens
    assert next(steps) <= max(free_at) + 2


def test_a_request_due_during_a_step_counts_from_when_it_was_due() -> None:
    it = simulate(
        lambda: engine_target(step_s=0.01),
        engine_workload(10, 20),
        Load(lambda: iter([0.0, 0.015]), requests=2),
    )
    first, second = it.records
    assert first.ttft_s == pytest.approx(0.01)
    assert second.sent_s == pytest.approx(0.015)
    assert (second.times[0]) == pytest.approx(0.03)


def test_an_engine_finds_shared_prefixes_and_its_own_answers() -> None:
    it = simulate(
        lambda: engine_target(),
        engine_workload(8, 3, prefixes=1, prefix_len=40),
        Load(None, concurrency=1, requests=4),
    )
    assert [record.cached_tokens for record in it.records] == [0, 40, 40, 40]
    conversation = ConversationWorkload(0, Form.TOKENS, Lengths(12), Lengths(4), 3, 0.0, Vocabulary(1000))
    it = simulate(lambda: engine_target(), conversation, Load(None, concurrency=1, requests=3))
    assert [record.input_tokens for record in it.records] == [12, 28, 44]
    assert [record.cached_tokens for record in it.records] == [0, 12, 28]
    assert conversation.replaced == 0


def test_an_engines_refusals_are_failures() -> None:
    it = simulate(lambda: engine_target(), engine_workload(5000, 3), Load(None, concurrency=1, requests=2))
    assert [record.failure.kind for record in it.records if record.failure] == [FailureKind.REFUSED] * 2
    texts = RandomWorkload(0, Form.MESSAGES, Lengths(4), Lengths(3))
    it = simulate(lambda: engine_target(), texts, Load(None, concurrency=1, requests=1))
    failed = it.records[0].failure
    assert failed is not None and "no chat template" in failed.message


def test_stopping_a_run_leaves_the_engine_empty() -> None:
    targets: list[EngineTarget] = []

    def build() -> EngineTarget:
        targets.append(engine_target(step_s=0.01))
        return targets[0]

    async def stop(it: Run) -> None:
        await asyncio.sleep(0.255)
        it.stop()
        await asyncio.sleep(0.1)
        scheduler = targets[0]._engine.scheduler
        assert not targets[0]._engine.has_work
        assert scheduler.cache.pool.held == 0

    it = simulate(build, engine_workload(10, 100), Load(None, concurrency=4, requests=50), stop)
    assert [r.failure.kind for r in it.records if r.failure] == [FailureKind.CANCELLED] * 4
    assert it.records[0].output_tokens == 25


def test_an_engine_that_fails_ends_its_requests() -> None:
    def build() -> EngineTarget:
        target = engine_target(step_s=0.01)
        submit, steps = target._engine.executor.submit, itertools.count()

        def failing(plan):  # type: ignore[no-untyped-def]
            if next(steps) == 5:
                raise FloatingPointError("a kernel went wrong")
            return submit(plan)

        target._engine.executor.submit = failing  # type: ignore[method-assign]
        return target

    runs: list[Run] = []

    async def keep(it: Run) -> None:
        runs.append(it)

    with pytest.raises(FloatingPointError):
        simulate(build, engine_workload(10, 100), Load(None, concurrency=2, requests=5), keep)
    kinds = [record.failure.kind for record in runs[0].records if record.failure]
    assert kinds == [FailureKind.DISCONNECTED] * 2 + [FailureKind.CONNECT] * 3


def test_an_engine_goes_on_from_the_text_of_its_own_answers() -> None:
    tokenizer = byte_tokenizer()
    turns: list[Turn] = []

    class Watched(EngineTarget):
        async def send(self, turn: Turn, record: Record) -> Answer:
            turns.append(turn)
            answer = await super().send(turn, record)
            assert answer.text == tokenizer.decode(answer.token_ids or [])
            return answer

    def build() -> EngineTarget:
        engine, _ = EngineShape(max_model_len=4096, num_blocks=2000).build()
        template = ChatTemplate(TEMPLATE, {})
        return Watched(engine, "hash", tokenizer=tokenizer, chat_template=template, now=now)

    chat = ConversationWorkload(0, Form.MESSAGES, Lengths(4), Lengths(6), 2, 0.0)
    it = simulate(build, chat, Load(None, concurrency=1, requests=2))
    assert all(record.completed for record in it.records)
    said = turns[1].messages or []
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert len(str(said[1]["content"])) >= 6
    assert (it.records[1].cached_tokens or 0) >= (it.records[0].input_tokens or 0) - 4
