"""Workers of several models behind one gateway: who is whose, and that no text changes its model midway."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from house import HEARTBEAT_S, EngineShape, collect, request
from test_who_may_join import NO_CHANNEL, worker

from headrace.cluster import Gateway
from headrace.cluster.options import GatewayOptions, ModelOptions
from headrace.cluster.registry import Registry, Unfit
from headrace.engine import Engine
from headrace.engine.limits import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import ErrorCode, GenerateRequest
from headrace.sim import Crash, Simulation, run
from headrace.sim.hash_executor import expected_tokens, model_of
from headrace.sim.launcher import TaskLauncher
from headrace.worker import Supervisor, WorkerOptions, serve

LARGE, SMALL = "large", "small"
SHAPES = {LARGE: EngineShape(step_s=0.01), SMALL: EngineShape(vocab_size=500, step_s=0.002)}
"""Of other vocabularies: what one says is never what the other would."""
MODELS = GatewayOptions(
    models=(ModelOptions(name=LARGE), ModelOptions(name=SMALL)), heartbeat_s=HEARTBEAT_S, lapse_s=1.0
)


@dataclass
class Houses:
    """A gateway, and workers of two models on hosts of their own."""

    simulation: Simulation
    gateway: Gateway
    engines: dict[str, Engine] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def start(self, *names: str) -> None:
        """Workers, named by their model and a number."""
        for name in names:
            self._start(name)
        await self.gateway.wait_ready(len(self.tasks))

    def _start(self, name: str) -> None:
        world = self.simulation.world(name)
        model = name.rpartition("-")[0]
        engine, info = SHAPES[model].build()
        info = msgspec.structs.replace(info, model=model, revision=f"revision of {model}")
        launcher = TaskLauncher(lambda address: serve(world, address, engine, info))
        options = WorkerOptions(worker_id=name, join=(self.gateway.address,))
        with self.simulation.on(name):
            supervisor = Supervisor(world, options, launcher, f"{name}:7100")
            self.tasks[name] = asyncio.create_task(supervisor.run())
        self.engines[name] = engine

    async def kill(self, name: str) -> None:
        self.simulation.network.crash_host(name, Crash.RESET)
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def tokens(self, asked: GenerateRequest) -> list[int]:
        found = await collect(self.gateway.submit(asked))
        tokens, finish = found[asked.request_id, 0]
        assert finish.error is None, finish
        return tokens

    def expected(self, asked: GenerateRequest, model: str) -> list[int]:
        engine = next(engine for name, engine in self.engines.items() if name.startswith(model))
        return expected_tokens(asked, 0, model_of(engine), SHAPES[model].max_model_len)


def in_houses(body: Callable[[Houses], Awaitable[None]], options: GatewayOptions = MODELS) -> str:
    async def main(simulation: Simulation) -> None:
        with simulation.on("gateway"):
            gateway = Gateway(simulation.world("gateway"), None, options)
            await gateway.listen("gateway:7000")
        houses = Houses(simulation, gateway)
        try:
            await body(houses)
        finally:
            await gateway.drain(0.0)
            for name in list(houses.tasks):
                await houses.kill(name)

    return run(main, max_virtual_s=100.0).trace_hash


def of(model: str, name: str, max_tokens: int = 8) -> GenerateRequest:
    return msgspec.structs.replace(request(name, max_tokens=max_tokens), model=model)


def test_each_request_is_answered_by_its_model() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1", "large-2", "small-2")
        asked = [of((LARGE, SMALL)[number % 2], f"r{number}") for number in range(12)]
        answers = await asyncio.gather(*(houses.tokens(one) for one in asked))
        for one, tokens in zip(asked, answers, strict=True):
            assert tokens == houses.expected(one, one.model), one.model
            (journey,) = houses.gateway.journeys.of(one.request_id)
            for decision in journey.decisions:
                assert {name.rpartition("-")[0] for name in decision.workers} == {one.model}

    in_houses(body)


def test_a_request_that_names_no_model_gets_the_first() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("small-1", "large-1")
        asked = of("", "r")
        assert await houses.tokens(asked) == houses.expected(asked, LARGE)

    in_houses(body)


def test_a_request_that_lost_its_worker_goes_on_at_one_of_its_model() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1", "small-2")
        await asyncio.sleep(2.1 * HEARTBEAT_S)  # the gateway waits for nobody that it does not know
        asked = of(SMALL, "r", 200)
        answer = asyncio.create_task(houses.tokens(asked))
        await asyncio.sleep(0.1)
        (journey,) = houses.gateway.journeys.of("r")
        await houses.kill(journey.entries[0].worker)
        assert await answer == houses.expected(asked, SMALL)
        assert [entry.what for entry in journey.entries].count("placed") == 2

    in_houses(body)


@pytest.mark.parametrize("seed", range(5))
def test_whoever_dies_no_text_changes_its_model(seed: int) -> None:
    async def body(houses: Houses) -> None:
        await houses.start(*(f"{model}-{number}" for model in (LARGE, SMALL) for number in range(3)))
        chance = random.Random(seed)
        asked = [of(chance.choice([LARGE, SMALL]), f"r{number}", 100) for number in range(40)]
        answers = [asyncio.create_task(houses.tokens(one)) for one in asked]
        for model in chance.sample([LARGE, SMALL], 2):
            await asyncio.sleep(chance.uniform(0.0, 0.5))
            await houses.kill(f"{model}-{chance.randrange(3)}")
        for one, answer in zip(asked, answers, strict=True):
            assert await answer == houses.expected(one, one.model), one.model
        moved = [entry for one in asked for entry in houses.gateway.journeys.of(one.request_id)[0].entries]
        assert "replayed" in {entry.what for entry in moved}

    in_houses(body)


def test_a_request_without_another_worker_of_its_model_ends() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1")
        await asyncio.sleep(2.1 * HEARTBEAT_S)
        stream = houses.gateway.submit(of(SMALL, "r", 200))
        await asyncio.sleep(0.1)
        await houses.kill("small-1")
        ((_, finish),) = (await collect(stream)).values()
        assert finish.error is not None
        assert finish.error.code is ErrorCode.UNAVAILABLE
        assert "the engine was lost under the request" in finish.error.message, (
            "it waited for the other model"
        )
        with pytest.raises(RequestRefused, match="no worker of the model 'small' serves now") as refused:
            houses.gateway.submit(of(SMALL, "again"))
        assert refused.value.error.code is ErrorCode.UNAVAILABLE
        again = of(LARGE, "large")
        assert await houses.tokens(again) == houses.expected(again, LARGE)

    in_houses(body)


def test_limits_are_those_of_the_model() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1")
        prompt = msgspec.structs.replace(of(LARGE, "r"), prompt=[700])
        await houses.tokens(prompt)
        with pytest.raises(RequestRefused, match="500"):
            houses.gateway.submit(msgspec.structs.replace(prompt, model=SMALL))

    in_houses(body)


def test_requests_of_two_models_are_not_made_together() -> None:
    async def body(houses: Houses) -> None:
        await houses.start("large-1", "small-1")
        with pytest.raises(ValueError, match="of one model"):
            houses.gateway.submit(of(LARGE, "a"), of(SMALL, "b"))
        assert houses.gateway.open_samples == 0

    in_houses(body)


def test_turns_are_taken_among_the_workers_of_a_model() -> None:
    """One order of turns for all would give each second of two alternating models to the same worker."""

    async def body(houses: Houses) -> None:
        await houses.start("large-1", "large-2", "small-1", "small-2")
        homes = []
        for number in range(8):
            await houses.tokens(of((LARGE, SMALL)[number % 2], f"r{number}"))
            (journey,) = houses.gateway.journeys.of(f"r{number}")
            homes.append(journey.decisions[0].worker)
        assert homes == ["large-1", "small-1", "large-2", "small-2"] * 2

    in_houses(body, replace(MODELS, routing=replace(MODELS.routing, policy="round_robin")))


def test_workers_fit_to_those_of_their_model_only() -> None:
    registry = Registry(GatewayOptions())
    registry.register(worker("a"), NO_CHANNEL, 0.0)
    registry.register(worker("b", model="other", revision="r9", dtype="float32"), NO_CHANNEL, 0.0)
    with pytest.raises(Unfit, match="its dtype is float32, and that of a is bfloat16"):
        registry.register(worker("c", dtype="float32"), NO_CHANNEL, 0.0)
    with pytest.raises(Unfit, match="its model revision is r1, and that of b is r9"):
        registry.register(worker("c", model="other", dtype="float32"), NO_CHANNEL, 0.0)


def test_what_waits_for_one_model_keeps_nobody_of_another_away() -> None:
    registry = Registry(GatewayOptions())
    registry.register(worker("a"), NO_CHANNEL, 0.0)
    lost = registry.get("a")
    assert lost is not None
    registry.down(lost, "lost", 1.0)
    registry.register(worker("b", model="other", dtype="float32"), NO_CHANNEL, 2.0, owes=True)


def test_only_workers_of_its_model_prefill_for_a_home() -> None:
    async def body(houses: Houses) -> None:
        registry = houses.gateway.registry
        for name, model, role in (
            ("home", LARGE, Role.DECODE),
            ("near", LARGE, Role.PREFILL),
            ("far", SMALL, Role.PREFILL),
        ):
            info = msgspec.structs.replace(worker(name, model=model), role=role, data_address="d:1")
            registry.register(info, NO_CHANNEL, 0.0)
        home = registry.get("home")
        assert home is not None
        possible = houses.gateway._dispatch.possible_prefills(home)
        assert [member.worker_id for member in possible.members] == ["near"]
        for member in list(registry):
            registry.down(member, "over", 0.0)

    in_houses(body)


def test_a_worker_of_a_model_that_is_not_served_is_refused() -> None:
    registry = Registry(
        GatewayOptions(models=(ModelOptions(name="a", revision="r1"), ModelOptions(name="b", revision="r2")))
    )
    with pytest.raises(Unfit, match="its model is 'c', and the gateway serves a, b; give it one of"):
        registry.register(worker("w", model="c", revision="r3"), NO_CHANNEL, 0.0)
    with pytest.raises(Unfit, match="its model revision is r2, and that of the gateway is r1"):
        registry.register(worker("w", model="a", revision="r2"), NO_CHANNEL, 0.0)


def test_weights_tell_whose_a_worker_of_another_name_is() -> None:
    served = (ModelOptions(name="a", revision="r1"), ModelOptions(name="b", revision="r2"))
    registry = Registry(GatewayOptions(models=served))
    registry.register(worker("w", model="its own name", revision="r2"), NO_CHANNEL, 0.0)
    found = registry.get("w")
    assert found is not None
    assert found.model == found.info.engine.model == "b"
    twice = Registry(GatewayOptions(models=(*served, ModelOptions(name="c", revision="r2"))))
    with pytest.raises(Unfit, match="--served-model-name"):
        twice.register(worker("w", model="its own name", revision="r2"), NO_CHANNEL, 0.0)
