"""A server from start to end: socket, engine process and HTTP, and what the signals do to them.

    loading ──ready──▶ serving ──SIGTERM──▶ draining ──all ended, or time is up──▶ gone
       │                  └──SIGINT: draining with no time──▶ gone
       └──either──▶ gone              (a second signal, anywhere: gone at once)

The socket answers as soon as the tokenizer is read, while the engine loads: /health and /ready tell where the
server stands.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from headrace import __version__
from headrace.api.app import create_app
from headrace.api.http import HttpServer
from headrace.api.naming import untalkative
from headrace.api.served import ServedModel, Server
from headrace.api.workers import Door, Pools, launchers
from headrace.cluster import LocalCluster
from headrace.cluster.options import GatewayOptions, ModelOptions
from headrace.config import EngineOptions, ServingOptions
from headrace.config.engine import CACHE_KEY_BYTES
from headrace.observe import Metrics, MetricsByModel
from headrace.protocol.messages import EngineInfo
from headrace.store import ModelFiles
from headrace.worker.process import ENGINE_COMMAND
from headrace.world import real_world
from headrace.world.signals import Signals

YOUNG_OBJECTS = 5000
"""So many more objects that can be part of a cycle are there before cycles are looked for."""


class Service:
    """One model, or several, served on one socket."""

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        bound: socket.socket,
        *,
        serving: ServingOptions | None = None,
        drain_timeout_s: float = 30.0,
        started_s: float | None = None,
        say: Callable[[str], None] = print,
        pools: Pools | None = None,
        door: Door | None = None,
        gateway: GatewayOptions | None = None,
        others: Mapping[str, ModelFiles] | None = None,
        names: tuple[str, ...] = (),
        engine_command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        """`bound` listens already. `say` gets lines for people. `started_s` is when start-up began.

        `others`, by name, are served beside the model with workers that join; `names` are all that clients
        may ask for, the first of which is meant where they name none.
        """
        self._options = options
        self._bound = bound
        self._drain_timeout_s = drain_timeout_s
        self._started_s = time.monotonic() if started_s is None else started_s
        self._say = say
        self._signals: list[signal.Signals] = []
        self._signalled = asyncio.Event()
        self._stopped = False
        self._door = door
        self._world = real_world(door.credentials if door is not None else None, say)
        self._models = {options.served_name: files, **(others or {})}
        self._names = names
        gateway = gateway or GatewayOptions()
        smaller = {model.name: model.smaller for model in gateway.models}
        gateway = replace(
            gateway,
            models=tuple(
                ModelOptions(name=name, revision=each.revision, smaller=smaller.get(name, ""))
                for name, each in self._models.items()
            ),
        )
        several = len(self._models) > 1
        self._metrics: Metrics | MetricsByModel = (
            MetricsByModel(self._world.now, gateway)
            if several
            else Metrics(options.served_name, self._world.now, gateway)
        )
        self._slo = gateway.slo
        self._pools = pools or Pools()
        key = door.credentials.cluster_key if door is not None else os.urandom(CACHE_KEY_BYTES)
        self._cluster = LocalCluster(
            self._world,
            launchers(
                self._pools,
                options,
                say,
                cache_key=key,
                joinable=door is not None,
                engine_command=engine_command,
            ),
            listen=door.address if door is not None else None,
            observer=self._metrics,
            options=replace(gateway, cache_key=key),
            report=say,
        )
        self._http: HttpServer | None = None
        self._files = files
        self._serving = serving or ServingOptions()

    async def run(self) -> None:
        """Serve until a signal says otherwise.

        Raises StartFailedError or WorkerLostError when the engine cannot be run, TextError for a tokenizer or
        chat template that cannot be read.
        """
        try:
            with Signals(self._on_signal):
                await self._run()
        finally:
            gc.unfreeze()  # what stayed is freed with the interpreter, which else tells of leaks

    async def _run(self) -> None:
        self._say(self._intent())
        signalled = asyncio.create_task(self._signalled.wait(), name="signals")
        opening = asyncio.create_task(self._open(), name="start-up")
        try:
            await asyncio.wait({opening, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                ready = await opening
                _keep_what_stays()
                self._tell_ready(ready)
                lost = asyncio.create_task(self._cluster.wait_given_up(), name="engine end")
                await asyncio.wait({lost, signalled}, return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    await lost  # raises why; else all were drained
                    if self._door is not None:
                        await self._signalled.wait()  # workers of elsewhere serve, now or later
                    else:
                        self._say("all workers have left")
                lost.cancel()
            await self._stop()
        finally:
            signalled.cancel()
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await self._cluster.stop()
            if self._http is not None:
                await self._http.stop()
            self._bound.close()

    async def _open(self) -> EngineInfo:
        """Start the engine, and while it loads read the model's text and begin to answer."""
        starting = asyncio.create_task(self._cluster.start(), name="engine start")
        try:
            model, *others = await asyncio.to_thread(self._read)
            server = Server(
                self._cluster.gateway,
                model,
                self._metrics,
                self._world.random.stream("seeds"),
                self._serving,
                self._slo,
                others=tuple(others),
                names=self._names,
            )
            for line in untalkative(server):
                self._say(line)
            self._http = HttpServer(create_app(server), self._bound)
            await self._http.start()
            return await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    def _read(self) -> list[ServedModel]:
        """The models' texts."""
        read = [ServedModel.from_files(files, name) for name, files in self._models.items()]
        for model in read[: len(read) if len(read) > 1 else 0]:
            _ = model.vocabulary  # takes a moment, and is compared while requests are served
        return read

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopped:
            return  # all is over, and was said to be
        self._signals.append(number)
        if len(self._signals) > 1:
            self._say("stopping at once")
            self._cluster.discard()
            os._exit(128 + number)  # the kernel ends the engine with this process
        self._signalled.set()

    async def _stop(self) -> None:
        running = self._cluster.gateway.open_samples
        interrupted = bool(self._signals) and self._signals[0] is not signal.SIGTERM
        drain_s = 0.0 if interrupted else self._drain_timeout_s
        if running and drain_s:
            self._say(f"draining: {running} running or waiting, {drain_s:g} s at most; new requests get 503")
        if not await self._cluster.stop(drain_s):
            self._say("some requests had not ended and were cancelled")
        self._stopped = True
        self._say("stopped")

    # ---- words ---------------------------------------------------------------------------------------

    def _intent(self) -> str:
        files, options = self._files, self._options
        names = list(self._pools.roles())
        said = f"headrace {__version__}: {options.served_name} ({files.model_type}) from {files.directory}"
        for name, other in self._models.items():
            if other is not files:
                said += f", {name} ({other.model_type}) from {other.directory}"
        if names:
            each = max(1, options.threads // len(names))
            said += f", workers {', '.join(names)} with" if len(names) > 1 else ","
            said += f" {each} thread{'s' * (each > 1)}{' each' * (len(names) > 1)}"
        return said

    def _tell_ready(self, info: EngineInfo) -> None:
        for note in info.notes:
            self._say(note)
        self._say(f"up to {info.max_num_seqs} sequences at once, each of at most {info.max_model_len} tokens")
        host, port = self._bound.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        took_s = time.monotonic() - self._started_s
        self._say(f"ready after {took_s:.1f} s: http://{where}/v1")


def _keep_what_stays() -> None:
    """Spare the collector what start-up made (modules, routes, tokenizer), which stays until the end: to walk
    through all of it for each collection of the oldest generation took a tenth of the process's time. What
    requests make frees itself but for a few cycles, so looking for those can wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
