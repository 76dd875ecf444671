"""A real HTTP server on loopback over a hash engine, with a tokenizer of bytes and made-up words."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from headrace.api import ServedModel, Server, create_app
from headrace.api.http import HttpServer, bind
from headrace.cluster import Gateway, GatewayState
from headrace.cluster.options import GatewayOptions
from headrace.config import ServingOptions
from headrace.engine import Engine
from headrace.observe import Metrics, MetricsByModel
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim.hash_executor import expected, model_of
from headrace.sim.launcher import TaskLauncher
from headrace.text import ChatTemplate, Tokenizer
from headrace.worker import Supervisor, WorkerOptions, serve
from headrace.world import real_world

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import HEARTBEAT_S, EngineShape

VOCAB_SIZE = 1000
EOS = 999
SEPARATOR = 998
TEMPLATE = (
    "{% for message in messages %}<|sep|>{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools at the start') }}{% endif %}"
    "{% if shout is defined %}!{% endif %}"
    "{% if add_generation_prompt %}<|sep|>assistant:{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then words that only decoding knows (" w300", …), then two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary |= {f"Ġw{number}": number for number in range(256, SEPARATOR)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|sep|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer = Tokenizer(backend, eos_token_ids=[EOS])
    assert tokenizer.token_to_id("<|sep|>") == SEPARATOR
    assert tokenizer.token_to_id("<|end|>") == EOS
    return tokenizer


class ApiHouse:
    """A server in a thread of its own, from `start` to `stop`; calls come from the test's thread."""

    def __init__(
        self,
        shape: EngineShape | None = None,
        *,
        serving: ServingOptions | None = None,
        options: GatewayOptions | None = None,
    ) -> None:
        self.shape = shape or EngineShape(
            max_model_len=512,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            max_num_batched_tokens=128,
            num_blocks=2000,
        )
        self.tokenizer = byte_tokenizer()
        self.serving = serving or ServingOptions()
        self.options = replace(options or GatewayOptions(), heartbeat_s=HEARTBEAT_S)
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="api house")

    def __enter__(self) -> ApiHouse:
        self._thread.start()
        assert self._ready.wait(20), "the server did not start"
        if self.failure is not None:
            raise self.failure
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"
        if self.failure is not None:
            raise self.failure

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        """Run a coroutine in the server's loop and return its result."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(function(*arguments), self.loop)
        return future.result(20)

    def do(self, function: Callable[[], Any]) -> Any:
        """Call a function in the server's loop."""

        async def called() -> Any:
            return function()

        return self.call(called)

    def start_worker(self) -> None:
        self.call(self._dial)

    async def _dial(self) -> None:
        """Let a worker with a new engine dial in."""
        self.engine, info = self.shape.build()
        launcher = TaskLauncher(lambda address: serve(real_world(), address, self.engine, info))
        options = WorkerOptions(worker_id="w", join=(self.gateway.address,))
        supervisor = Supervisor(real_world(), options, launcher, self.gateway.address + ".engine")
        self.worker = asyncio.create_task(supervisor.run())
        await self.gateway.wait_ready()

    def kill_worker(self) -> None:
        async def kill() -> None:
            await asyncio.sleep(2.1 * HEARTBEAT_S)  # a gateway any younger would wait for another worker
            self.worker.cancel()
            await asyncio.gather(self.worker, return_exceptions=True)
            while self.gateway.state is GatewayState.READY:
                await self.gateway.wait_changed()

        self.call(kill)

    def expected_text(self, prompt: list[int], **sampling: Any) -> str:
        """What the model says after `prompt`, its stop token left out."""
        return self.tokenizer.decode(self.expected(prompt, **sampling).tokens)

    def expected(self, prompt: list[int], index: int = 0, **sampling: Any) -> Any:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling})
        request = GenerateRequest(request_id="alone", prompt=prompt, sampling=params)
        return expected(request, index, model_of(self.engine), self.shape.max_model_len)

    def assert_quiet(self) -> None:
        """Nothing runs and nothing is held, within a few seconds."""
        deadline = time.monotonic() + 5
        pool = self.engine.scheduler.cache.pool
        while self.gateway.open_samples or self.engine.has_work or pool.held:
            assert time.monotonic() < deadline, "something is still held"
            time.sleep(0.005)
        self.do(pool.check)

    def server(self) -> Server:
        """What the application is made for."""
        model = ServedModel("hash", self.tokenizer, ChatTemplate(TEMPLATE))
        return Server(self.gateway, model, self.metrics, random.Random(0), self.serving)

    background: list[asyncio.Task[Any]] = []  # noqa: RUF012  # tasks that a test began
    engine: Engine
    gateway: Gateway
    metrics: Metrics | MetricsByModel
    port: int

    def _run(self) -> None:
        try:
            uvloop.run(self._live())
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.metrics = (
            MetricsByModel(self.loop.time, self.options)
            if self.options.models
            else Metrics("hash", self.loop.time, self.options)
        )
        self.gateway = Gateway(real_world(), self.metrics, self.options)
        with tempfile.TemporaryDirectory() as directory:
            await self.gateway.listen(f"unix:{directory}/gateway.sock", own=True)
            await self._dial()
            bound = bind("127.0.0.1", 0)
            self.port = bound.getsockname()[1]
            http = HttpServer(create_app(self.server()), bound)
            await http.start()
            self._ready.set()
            await self._stop.wait()
            await self.gateway.drain(0.0)
            await http.stop()
            self.worker.cancel()
            await asyncio.gather(self.worker, return_exceptions=True)
