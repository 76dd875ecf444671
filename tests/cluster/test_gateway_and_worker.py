"""Gateway and worker together, the same bodies in virtual time and over real sockets."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from house import WORLDS, EngineShape, House, collect, in_house, request

from headrace.cluster import Ending, GatewayObserver, GatewayState, StartFailedError
from headrace.engine import RequestRefused
from headrace.protocol.channel import Channel
from headrace.protocol.engine_messages import EngineReady, FromEngine
from headrace.protocol.messages import (
    PROTOCOL_VERSION,
    Draining,
    EngineInfo,
    FromGateway,
    Hello,
    Outputs,
    Rejected,
    Role,
    StartFailed,
    StepStats,
    Submit,
    Welcome,
    WorkerInfo,
)
from headrace.protocol.requests import ErrorCode, Finish, FinishReason, GenerateRequest, SequenceOutput
from headrace.sim import Crash
from headrace.worker import serve
from headrace.world import Connection, ConnectionLost

everywhere = pytest.mark.parametrize("kind", WORLDS)
SLOW = EngineShape(step_s=0.005, max_model_len=4096, num_blocks=2000)


@everywhere
@pytest.mark.parametrize("depth", [1, 2])
def test_outputs_are_those_of_each_request_alone(kind: str, depth: int) -> None:
    async def body(house: House) -> None:
        generator = random.Random(1)
        requests = [request(f"r{i}", generator) for i in range(30)]
        streams = [house.gateway.submit(r) for r in requests]
        for r, stream in zip(requests, streams, strict=True):
            results = await collect(stream)
            assert len(results) == r.sampling.n
            for (_, index), (tokens, finish) in results.items():
                assert tokens == house.expected(r, index)
                assert finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert house.gateway.open_samples == 0
        house.assert_nothing_held()

    in_house(kind, body, EngineShape(depth=depth, step_s=0.001, num_blocks=60))


@everywhere
def test_one_stream_carries_several_requests(kind: str) -> None:
    async def body(house: House) -> None:
        requests = [request(f"r{i}", prompt=[i, i + 1], n=2) for i in range(3)]
        results = await collect(house.gateway.submit(*requests))
        assert len(results) == 6
        for r in requests:
            assert results[r.request_id, 1][0] == house.expected(r, 1)

    in_house(kind, body)


@everywhere
def test_a_cancellation_takes_effect_within_one_step(kind: str) -> None:
    async def body(house: House) -> None:
        stream = house.gateway.submit(request("long", max_tokens=4000))
        got = 0
        async for outputs in stream:
            got += len(outputs[0].tokens)
            if got >= 5:
                break
        steps = house.steps
        stream.cancel("long")
        last = [output async for outputs in stream for output in outputs][-1]
        assert last.finish is not None
        assert last.finish.reason is FinishReason.CANCELLED
        assert house.steps - steps <= 1
        await house.until(lambda: not house.engine.has_work, "the end of work")
        house.assert_nothing_held()

    in_house(kind, body, SLOW)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_cancellation_is_seen_between_two_steps_that_never_wait(kind: str) -> None:
    """The executor computes inline here: without turns between steps the inbox would never fill.

    Not in virtual time, where steps that take none leave no instant in which a message could arrive.
    """

    async def body(house: House) -> None:
        stream = house.gateway.submit(request("long", max_tokens=4000))
        await anext(stream)
        steps = house.steps
        stream.cancel("long")
        endings = [o.finish async for outputs in stream for o in outputs if o.finish is not None]
        assert [finish.reason for finish in endings] == [FinishReason.CANCELLED]
        assert house.steps - steps <= 2  # one may be under way, and one may begin before the socket is read

    in_house(kind, body, EngineShape(max_model_len=4096, num_blocks=2000))


@everywhere
def test_one_sample_can_be_cancelled_alone(kind: str) -> None:
    async def body(house: House) -> None:
        r = request("three", n=3, max_tokens=50, temperature=1.0)
        stream = house.gateway.submit(r)
        results: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reasons = {}
        async for outputs in stream:
            for output in outputs:
                results[output.index] += output.tokens
                if output.finish:
                    reasons[output.index] = output.finish.reason
            if len(results[1]) >= 3 and 1 not in reasons:
                stream.cancel("three", 1)
        assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.CANCELLED, 2: FinishReason.LENGTH}
        assert results[0] == house.expected(r, 0)
        assert results[2] == house.expected(r, 2)
        assert results[1] == house.expected(r, 1)[: len(results[1])]

    in_house(kind, body, SLOW)


@everywhere
def test_a_closed_stream_leaves_nothing_behind(kind: str) -> None:
    async def body(house: House) -> None:
        with house.gateway.submit(request("left", max_tokens=4000, n=2)) as stream:
            await anext(stream)
        assert [outputs async for outputs in stream] == []
        await house.until(lambda: house.gateway.open_samples == 0, "the ending of what was left")
        await house.until(lambda: not house.engine.has_work, "the end of work")
        house.assert_nothing_held()

    in_house(kind, body, SLOW)


@everywhere
@pytest.mark.parametrize("how", [Crash.RESET, Crash.END])
def test_a_dead_engine_ends_every_sample_once_and_a_new_one_serves(kind: str, how: Crash) -> None:
    async def body(house: House) -> None:
        await house.grow_old()
        requests = [request(f"r{i}", n=2, max_tokens=4000) for i in range(6)]
        streams = [house.gateway.submit(r) for r in requests]
        await anext(streams[0])
        await house.kill_worker(how)
        for stream in streams:
            results = await collect(stream)
            assert len(results) == 2
            for _, finish in results.values():
                assert finish.reason is FinishReason.ERROR
                assert finish.error is not None
                assert finish.error.code is ErrorCode.UNAVAILABLE
        assert house.gateway.open_samples == 0
        assert house.gateway.state is GatewayState.DEAD
        with pytest.raises(RequestRefused) as refused:
            house.gateway.submit(request("late"))
        assert refused.value.error.code is ErrorCode.UNAVAILABLE

        house.start_worker()
        await house.gateway.wait_ready()
        r = request("again")
        assert (await collect(house.gateway.submit(r)))["again", 0][0] == house.expected(r)

    in_house(kind, body, SLOW)


@everywhere
def test_a_failing_executor_ends_every_request_and_its_process(kind: str) -> None:
    async def body(house: House) -> None:
        await house.grow_old()
        house.break_at = 4
        streams = [house.gateway.submit(request(f"r{i}", max_tokens=100, n=2)) for i in range(3)]
        for stream in streams:
            for _, finish in (await collect(stream)).values():
                assert finish.error is not None
                assert finish.error.code is ErrorCode.UNAVAILABLE
                assert "a kernel went wrong" in finish.error.message
        await house.gateway.wait_ready()  # with another engine
        r = request("again")
        assert (await collect(house.gateway.submit(r)))["again", 0][0] == house.expected(r)

    in_house(kind, body, SLOW)


@everywhere
def test_drain_finishes_what_was_accepted(kind: str) -> None:
    async def body(house: House) -> None:
        requests = [request(f"r{i}", max_tokens=20) for i in range(12)]  # more than run at once
        streams = [house.gateway.submit(r) for r in requests]
        await anext(streams[0])
        drained = asyncio.create_task(house.gateway.drain(60.0, dismiss=("w",)))
        await asyncio.sleep(0)
        assert house.gateway.state is GatewayState.DRAINING
        with pytest.raises(RequestRefused, match="shutting down"):
            house.gateway.submit(request("late"))
        for r, stream in list(zip(requests, streams, strict=True))[1:]:
            assert (await collect(stream))[r.request_id, 0][0] == house.expected(r)
        assert await drained is True
        assert house.worker is not None
        await house.worker  # returns, and raises nothing
        house.assert_nothing_held()

    in_house(kind, body, SLOW)


@everywhere
def test_drain_ends_what_takes_too_long(kind: str) -> None:
    async def body(house: House) -> None:
        stream = house.gateway.submit(request("long", max_tokens=4000))
        await anext(stream)
        assert await house.gateway.drain(0.05, dismiss=("w",)) is False
        assert [member.open_samples for member in house.gateway.registry] == [0]  # nor owes it anybody
        ((_, finish),) = (await collect(stream)).values()
        assert finish.error is not None
        assert finish.error.code is ErrorCode.UNAVAILABLE
        assert "stopped" in finish.error.message
        assert house.worker is not None
        await house.worker
        house.assert_nothing_held()

    in_house(kind, body, SLOW)


@everywhere
def test_an_engine_without_supervisor_gives_everything_back_and_returns(kind: str) -> None:
    async def body(house: House) -> None:
        world, worker_world = house.world, house.worker_world()
        address = house.gateway.address
        address = address + ".2" if address.startswith("unix:") else "gateway:7001"
        engine, info = house.shape.build()

        async def leave_suddenly(connection: Connection) -> None:
            channel: Channel[FromEngine] = Channel(connection, receives=FromEngine)
            assert isinstance(await channel.receive(), EngineReady)
            for i in range(20):
                channel.post(Submit(request(f"r{i}", max_tokens=4000)))
            await house.until(lambda: engine.scheduler.num_running > 0, "a running request")
            channel.abort()

        listener = await world.network.listen(address, leave_suddenly)
        async with asyncio.timeout(5):
            await serve(worker_world, address, engine, info)
        await listener.close()
        assert not engine.has_work
        assert engine.scheduler.cache.pool.held == 0

    in_house(kind, body, SLOW)


@everywhere
def test_a_slow_reader_holds_nobody_up_and_gets_longer_pieces(kind: str) -> None:
    async def body(house: House) -> None:
        slow_request = request("slow", max_tokens=200)
        slow = house.gateway.submit(slow_request)
        await anext(slow)
        first = house.expected(slow_request)[:1]
        quick = request("quick", max_tokens=100, prompt=[9])
        assert (await collect(house.gateway.submit(quick)))["quick", 0][0] == house.expected(quick)
        await house.until(lambda: house.gateway.open_samples == 0, "the slow one's end in the engine")
        rest = [outputs async for outputs in slow]
        assert len(rest) == 1  # everything at once
        assert first + rest[0][0].tokens == house.expected(slow_request)
        assert rest[0][0].finish is not None

    in_house(kind, body, EngineShape(step_s=0.001, num_blocks=500))


@everywhere
def test_what_does_not_fit_the_queue_is_refused_at_once(kind: str) -> None:
    async def body(house: House) -> None:
        streams = [house.gateway.submit(request(f"r{i}", n=2)) for i in range(3)]
        with pytest.raises(RequestRefused) as refused:
            house.gateway.submit(request("too many", n=2))
        assert refused.value.error.code is ErrorCode.OVERLOADED
        assert "the limit is 7" in refused.value.error.message
        last = house.gateway.submit(request("just one more"))
        for stream in (*streams, last):
            for tokens, _ in (await collect(stream)).values():
                assert len(tokens) == 8

    in_house(kind, body, EngineShape(max_num_seqs=4, max_waiting=3))


@everywhere
def test_what_can_never_be_served_is_refused_without_the_engine(kind: str) -> None:
    async def body(house: House) -> None:
        for bad, named in [
            (request("a", prompt=[5] * 256), "prompt"),
            (request("b", prompt=[1000]), "prompt"),
            (request("c", temperature=-1.0), "temperature"),
            (request("d", n=65), "n"),
        ]:
            with pytest.raises(RequestRefused) as refused:
                house.gateway.submit(request("fine"), bad)
            assert refused.value.error.field == named
        assert house.gateway.open_samples == 0  # all or none
        assert house.steps == 0

    in_house(kind, body)


@everywhere
def test_who_does_not_say_hello_is_dropped(kind: str) -> None:
    async def body(house: House) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        _, info = house.shape.build()
        again = worker_info("w", info)
        other = worker_info("other", msgspec.structs.replace(info, revision="1"))
        for first, why in (
            (Draining(), "the worker said Draining"),
            (Hello(PROTOCOL_VERSION + 1, other), f"said protocol {PROTOCOL_VERSION + 1}"),
            (Hello(PROTOCOL_VERSION, again), "another worker is called 'w'"),
            (Hello(PROTOCOL_VERSION, other), "its model revision is 1, and that of w is 0"),
            (Submit(request("x")), None),  # not even a worker's message
        ):
            stranger = await dial(house)
            stranger.post(first)
            try:
                answer = await stranger.receive()
            except ConnectionLost:
                answer = None
            assert (answer is None) == (why is None)
            if why is not None:
                assert isinstance(answer, Rejected)
                assert why in answer.reason
            stranger.abort()
        r = request("r")
        assert (await collect(house.gateway.submit(r)))["r", 0][0] == house.expected(r)

    in_house(kind, body)


@everywhere
def test_a_sample_ends_once_even_if_the_engine_says_so_twice(kind: str) -> None:
    async def body(house: House) -> None:
        await house.kill_worker()
        await house.lost()
        _, info = house.shape.build()
        worker = await dial(house)
        worker.post(Hello(PROTOCOL_VERSION, worker_info("v", info)))
        await house.gateway.wait_ready()
        stream = house.gateway.submit(request("r", n=2))
        assert isinstance(await worker.receive(), Welcome)
        while not isinstance(submit := await worker.receive(), Submit):
            assert submit is not None
        r = submit.request.request_id
        end = Finish(FinishReason.LENGTH)
        twice = [SequenceOutput(r, 0, [5], finish=end), SequenceOutput(r, 0, [6], finish=end)]
        worker.post(Outputs([*twice, SequenceOutput("stranger", 0, [7])]))
        worker.post(Outputs([SequenceOutput(r, 0, [8], finish=end), SequenceOutput(r, 1, finish=end)]))
        results = await collect(stream)
        assert results == {("r", 0): ([5], end), ("r", 1): ([], end)}
        assert house.gateway.open_samples == 0
        worker.abort()
        await house.lost()

    in_house(kind, body)


@everywhere
def test_an_engine_that_cannot_start_says_why(kind: str) -> None:
    async def body(house: House) -> None:
        await house.kill_worker()
        await house.lost()
        worker = await dial(house)
        worker.post(StartFailed("the model has no weights"))
        await worker.close()
        with pytest.raises(StartFailedError, match="the model has no weights"):
            await house.gateway.wait_ready()
        assert house.gateway.state is GatewayState.DEAD

    in_house(kind, body)


async def dial(house: House) -> Channel[FromGateway]:
    """A connection of somebody who says that it is a worker."""
    network = house.worker_world().network
    return Channel(await network.connect(house.gateway.address, timeout_s=5), receives=FromGateway)


def worker_info(name: str, info: EngineInfo) -> WorkerInfo:
    return WorkerInfo(worker_id=name, generation=1, role=Role.BOTH, data_address="", engine=info)


class Recorder(GatewayObserver):
    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.ttfts: list[float] = []
        self.gaps: list[tuple[float, int]] = []
        self.endings: list[tuple[FinishReason, int, int]] = []

    def step(self, worker_id: str, stats: StepStats) -> None:
        self.steps.append(stats)

    def first_tokens(self, request: GenerateRequest, ttft_s: float, tokens: int, prompt_tokens: int) -> None:
        self.ttfts.append(ttft_s)

    def next_tokens(self, request: GenerateRequest, gap_s: float, tokens: int) -> None:
        self.gaps.append((gap_s, tokens))

    def ended(self, ending: Ending) -> None:
        self.endings.append((ending.reason, ending.index, ending.output_tokens))


@everywhere
def test_what_is_measured_adds_up(kind: str) -> None:
    recorder = Recorder()

    async def body(house: House) -> None:
        await collect(house.gateway.submit(request("a", n=2, max_tokens=10)))
        assert sorted(recorder.endings) == [(FinishReason.LENGTH, 0, 10), (FinishReason.LENGTH, 1, 10)]
        assert len(recorder.ttfts) == 2
        assert sum(tokens for _, tokens in recorder.gaps) == 18
        assert sum(stats.sampled for stats in recorder.steps) == 20
        assert all(stats.step_s >= 0.9 * 0.002 for stats in recorder.steps)
        last = recorder.steps[-1]
        assert last.running == last.waiting == last.blocks_held == last.held_tokens == 0
        assert last.blocks_free + last.blocks_cached == house.shape.num_blocks
        busy = max(recorder.steps, key=lambda stats: stats.blocks_held)
        assert 0 < busy.held_tokens <= busy.blocks_held * house.shape.block_size

        # A cancellation alone computes nothing, and still the numbers follow.
        stream = house.gateway.submit(request("b", max_tokens=100))
        await anext(stream)
        stream.close()
        await house.until(lambda: len(recorder.endings) == 3, "the ending")
        assert recorder.steps[-1].running == 0
        assert recorder.steps[-1].blocks_held == 0

    in_house(kind, body, EngineShape(step_s=0.002), observer=recorder)


def random_life(seed: int) -> str:
    """Requests come and go at random while the engine's connection breaks now and then; see the asserts."""

    async def body(house: House) -> None:
        generator = random.Random(seed)
        assert house.simulation is not None

        async def client(number: int) -> None:
            await asyncio.sleep(generator.uniform(0, 2))
            r = request(f"r{number}", generator)
            patience = generator.choice([None, None, generator.randrange(1, 20)])
            try:
                stream = house.gateway.submit(r)
            except RequestRefused as refused:
                assert refused.error.code in (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED)
                return
            tokens: dict[int, list[int]] = {index: [] for index in range(r.sampling.n)}
            endings: dict[int, FinishReason] = {}
            async for outputs in stream:
                for output in outputs:
                    assert output.index not in endings
                    tokens[output.index] += output.tokens
                    if output.finish:
                        endings[output.index] = output.finish.reason
                if patience is not None and sum(map(len, tokens.values())) >= patience:
                    patience = None
                    if generator.random() < 0.5:
                        stream.close()
                    else:
                        stream.cancel(r.request_id)
            assert len(endings) == r.sampling.n or stream.closed
            for index, got in tokens.items():
                whole = endings.get(index) in (FinishReason.STOP, FinishReason.LENGTH)
                alone = house.expected(r, index)
                assert got == (alone if whole else alone[: len(got)])

        async def chaos() -> None:
            for _ in range(3):
                await asyncio.sleep(generator.uniform(0.2, 0.6))
                if generator.random() < 0.5:
                    house.simulation.network.break_connections("gateway", "worker")
                    await house.lost()  # and it dials in again, with nothing left of its requests
                else:
                    await house.kill_worker(generator.choice([Crash.RESET, Crash.END]))
                    await house.lost()
                    house.start_worker()
                await house.gateway.wait_ready()

        async with asyncio.TaskGroup() as group:
            group.create_task(chaos())
            for number in range(60):
                group.create_task(client(number))
        await house.until(lambda: house.gateway.open_samples == 0, "every ending")
        await house.until(lambda: not house.engine.has_work, "the end of work")
        house.assert_nothing_held()

    shape = EngineShape(step_s=0.004, num_blocks=40, max_num_seqs=6, max_waiting=60)
    return in_house("virtual", body, shape, seed=seed)


@pytest.mark.parametrize("seed", range(4 * int(os.environ.get("HEADRACE_EXAMPLES", "1"))))
def test_every_sample_ends_once_whatever_breaks(seed: int) -> None:
    random_life(seed)


def test_a_seed_gives_one_run_whatever_the_hash_seed() -> None:
    """Replay: PYTHONPATH=tests/cluster python -c "import test_gateway_and_worker as t; t.random_life(3)"."""
    here = Path(__file__).parent
    code = "import test_gateway_and_worker as t; print(t.random_life(3))"
    hashes = set()
    for hash_seed in ("1", "2"):
        path = os.pathsep.join([str(here), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1
