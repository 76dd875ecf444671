"""An engine in a real process: started, lost, started again, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop

from headrace.api.workers import WORKER_COMMAND
from headrace.cluster import GatewayState, LocalCluster, StartFailedError
from headrace.cluster.options import GatewayOptions
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams
from headrace.worker import WorkerOptions
from headrace.worker.process import ProcessOptions
from headrace.world import real_world
from headrace.world.launcher import LocalLauncher

HASH_ENGINE = (sys.executable, str(Path(__file__).with_name("hash_engine.py")))


def hash_worker(options: dict[str, Any], say: Callable[[str], None]) -> LocalLauncher:
    """Starts a worker process whose engine is `hash_engine.py`."""
    process = ProcessOptions(
        worker=WorkerOptions(worker_id="w"),
        engine=msgspec.Raw(json.dumps(options).encode()),
        engine_command=HASH_ENGINE,
    )
    return LocalLauncher(WORKER_COMMAND, msgspec.json.encode(process), say)


def ask(name: str, tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=tokens, ignore_eos=True)
    )


def with_engine(
    body: Callable[[LocalCluster, list[str]], Awaitable[None]],
    **options: Any,
) -> None:
    lines: list[str] = []

    async def main() -> None:
        local = LocalCluster(
            real_world(),
            {"w": hash_worker(options, lines.append)},
            options=GatewayOptions(heartbeat_s=0.1),  # its youth ends before an engine stands
            report=lines.append,
        )
        async with asyncio.timeout(30):
            try:
                await body(local, lines)
            finally:
                await local.stop()

    uvloop.run(main())
    assert_no_children()


earlier: list[psutil.Process] = []
"""Children that other tests have left: a pool of processes keeps a tracker of its own to the end."""


@pytest.fixture(autouse=True)
def count_no_earlier_children() -> None:
    earlier[:] = psutil.Process().children(recursive=True)


def assert_no_children() -> None:
    deadline = time.monotonic() + 5
    while children := [one for one in psutil.Process().children(recursive=True) if one not in earlier]:
        assert time.monotonic() < deadline, f"left behind: {children}"
        time.sleep(0.01)


def engine_process() -> psutil.Process:
    (worker,) = (one for one in psutil.Process().children() if one not in earlier)
    (engine,) = worker.children()
    return engine


def test_a_process_serves_and_its_words_are_forwarded() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        info = await local.start()
        assert info.model == "hash"
        tokens = [t async for outputs in local.gateway.submit(ask("r")) for o in outputs for t in o.tokens]
        assert len(tokens) == 5
        directory = Path(local.gateway.address.removeprefix("unix:")).parent
        assert directory.stat().st_mode & 0o777 == 0o700
        assert await local.stop(5.0) is True
        assert not directory.exists()
        assert lines == ["loading a model of hashes"]

    with_engine(body)


def test_an_engine_that_cannot_start_ends_the_attempt_with_its_reason() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        with pytest.raises(StartFailedError, match="the hashes are broken"):
            await local.start()

    with_engine(body, fail="refuse")


def test_an_engine_that_crashes_at_first_is_not_tried_again() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        with pytest.raises(StartFailedError, match="did not start: exit code 1"):
            await local.start()
        assert "RuntimeError: no hashes here" in lines
        assert lines.count("loading a model of hashes") == 1

    with_engine(body, fail="crash")


def test_stop_while_it_loads_kills_it() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        starting = asyncio.create_task(local.start())
        while not lines:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await local.stop(10.0)
        assert time.monotonic() - began < 2
        with pytest.raises(asyncio.CancelledError):
            await starting

    with_engine(body, fail="hang")


def test_a_killed_engine_ends_its_requests_and_is_started_again() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        await local.start()
        for life in range(2):
            streams = [local.gateway.submit(ask(f"r{life}{i}", 100_000)) for i in range(4)]
            await anext(streams[0])
            first = engine_process()
            first.send_signal(signal.SIGKILL)
            for stream in streams:
                endings = [o.finish async for outputs in stream for o in outputs if o.finish]
                assert [finish.reason for finish in endings] == [FinishReason.ERROR]
            assert local.gateway.state is GatewayState.DEAD
            await local.gateway.wait_ready()
            assert engine_process().pid != first.pid
        outputs = [o async for outputs in local.gateway.submit(ask("after")) for o in outputs]
        assert sum(len(o.tokens) for o in outputs) == 5
        assert any("lost with SIGKILL; starting it again in 0.1 s" in line for line in lines)

    with_engine(body, max_model_len=200_000, num_blocks=100_000)


def test_drain_lets_requests_finish_and_the_process_leave() -> None:
    async def body(local: LocalCluster, lines: list[str]) -> None:
        await local.start()
        process = engine_process()
        stream = local.gateway.submit(ask("r", 40))
        await anext(stream)
        stopping = asyncio.create_task(local.stop(10.0))
        outputs = [o async for outputs in stream for o in outputs]
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.reason is FinishReason.LENGTH
        assert await stopping is True
        assert not process.is_running()
        assert not any("lost" in line for line in lines)

    with_engine(body, step_s=0.005)


def test_no_engine_survives_its_gateway() -> None:
    """The gateway's process is killed outright: while the engine serves, and while it still loads."""
    script = """
import asyncio, json, sys
sys.path.insert(0, {here!r})
from test_engine_process import LocalCluster, hash_worker
from headrace.world import real_world

async def main():
    launcher = hash_worker({options!r}, lambda line: print(line, flush=True))
    local = LocalCluster(real_world(), {{"w": launcher}})
    await local.start()
    print("serving", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    for options, last in (({}, "serving"), ({"fail": "hang"}, "loading a model of hashes")):
        code = script.format(here=str(Path(__file__).parent), options=options)
        gateway = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert gateway.stdout is not None
        for line in gateway.stdout:
            if line.strip() == last:
                break
        else:
            pytest.fail("the gateway did not start")
        children = psutil.Process(gateway.pid).children(recursive=True)
        assert len(children) == 2  # a supervisor and its engine
        os.kill(gateway.pid, signal.SIGKILL)
        gateway.wait()
        gateway.stdout.close()
        psutil.wait_procs(children, timeout=5)
        assert not any(child.is_running() for child in children)


def test_the_gateway_never_loads_torch() -> None:
    code = "import sys, headrace.api, headrace.cluster, headrace.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
