"""Modelled engines: real scheduling, tokens that anybody can foretell, and the time that the model says."""

from __future__ import annotations

from collections import defaultdict

import pytest

from headrace.engine import Engine
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams, SequenceOutput
from headrace.sim.cost import ModelShape, Rates, StepCost
from headrace.sim.loop import VirtualLoop
from headrace.sim.modelled_executor import ModelledExecutor, ModelledShape, modelled_token

MODEL = ModelShape("m", 2, 8, 4, 2, 2, 16, 1000, 4096)
RATES = Rates(
    linear_flops_per_s=1e6,
    attention_flops_per_s=1e6,
    bytes_per_s=1e6,
    kv_bytes_per_s=1e6,
    step_s=0.001,
    row_s=0.0001,
)
COST = StepCost(MODEL, RATES)


def shape(stride: int = 1, **limits: int) -> ModelledShape:
    most = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 60, "block_size": 16} | limits
    return ModelledShape(cost=COST, stride=stride, max_model_len=500, vocab_size=1000, **most)


def ask(name: str, length: int, output: int, seed: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=output, ignore_eos=True, seed=seed)
    return GenerateRequest(request_id=name, prompt=[5] * length, sampling=sampling)


def run(engine: Engine, *requests: GenerateRequest) -> tuple[dict[str, list[int]], dict[str, str], float]:
    """Tokens and endings by request, and how long all took."""
    tokens: defaultdict[str, list[int]] = defaultdict(list)
    endings: dict[str, str] = {}

    async def steps() -> None:
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in await engine.step():
                tokens[output.request_id] += output.tokens
                if output.finish is not None:
                    endings[output.request_id] = output.finish.reason
        engine.scheduler.cache.pool.check()

    loop = VirtualLoop()
    try:
        loop.run_until_complete(steps())
        return dict(tokens), endings, loop.now
    finally:
        loop.close()


def test_a_request_takes_what_its_steps_cost() -> None:
    tokens, endings, took_s = run(shape().build(), ask("a", 100, 4))
    assert endings == {"a": FinishReason.LENGTH}
    assert tokens == {"a": [modelled_token(0, position, 1000) for position in range(100, 104)]}
    # Two chunks of the prompt, of which the second brings the first token, then one position a step.
    steps = [[(64, 0)], [(36, 64)], [(1, 100)], [(1, 101)], [(1, 102)]]
    assert took_s == pytest.approx(sum(COST.seconds(rows) for rows in steps))


def test_what_is_cached_is_not_paid_for_again() -> None:
    engine = shape(num_blocks=100).build()
    run(engine, ask("a", 100, 1))
    _, _, took_s = run(engine, ask("b", 100, 1))
    assert took_s == pytest.approx(COST.seconds([(4, 96)]))


@pytest.mark.parametrize("stride", [2, 3, 8])
def test_strides_bring_the_same_tokens_at_the_same_end(stride: int) -> None:
    requests = [ask(f"r{i}", 20 + i, 9 + i, seed=i) for i in range(3)]
    exact, endings, took_s = run(shape().build(), *requests)
    engine = shape(stride).build()
    quick, quick_endings, quick_s = run(engine, *requests)
    assert (quick, quick_endings) == (exact, endings)
    assert quick_s == pytest.approx(took_s)
    executor = engine.executor
    assert isinstance(executor, ModelledExecutor)
    assert executor.busy_s == pytest.approx(took_s)
    assert executor.tokens == sum(
        len(request.prompt) + request.sampling.max_tokens - 1 for request in requests
    )


def test_a_stride_waits_for_no_prompt() -> None:
    engine = shape(4).build()
    lengths: list[list[int]] = []

    async def steps() -> None:
        engine.add(ask("a", 20, 12))
        while engine.has_work:
            if len(lengths) == 2:
                engine.add(ask("b", 40, 5))
            await engine.step()
            if engine.last_step is not None:
                lengths.append([len(tokens) for tokens in engine.last_step[1].tokens])

    loop = VirtualLoop()
    loop.run_until_complete(steps())
    loop.close()
    # a: its prompt, a stride; beside b's prompt one token; then both in strides, to their ends.
    assert lengths == [[1], [4], [1, 1], [4, 4], [2]]


class Watched(Engine):
    """An engine that counts steps in which some rows bring several tokens and others compute a prompt."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.scheduler, engine.executor)
        self.strides_beside_prompts = 0

    async def step(self) -> list[SequenceOutput]:
        outputs = await super().step()
        if self.last_step is not None:
            plan, result = self.last_step
            recomputed = any(row.count > 2 for row in plan.rows)
            self.strides_beside_prompts += recomputed and max(map(len, result.tokens)) > 1
        return outputs


def test_preempted_sequences_are_computed_again() -> None:
    requests = [ask(f"r{i}", 100, 100, seed=i) for i in range(3)]
    tight = Watched(shape(2, num_blocks=28).build())  # room for two of them at their ends
    tokens, endings, took_s = run(tight, *requests)
    assert tight.scheduler.counters.preemptions > 0
    assert tight.strides_beside_prompts == 0
    assert set(endings.values()) == {FinishReason.LENGTH}
    for request in requests:
        assert tokens[request.request_id] == shape().expected(request, 0).tokens
    assert took_s > run(shape(2, num_blocks=100).build(), *requests)[2]
