"""The engine process's loop: take in what has arrived, step, report; one message a step.

The engine steps on the loop's own thread, and between two steps the inbox is emptied, so a cancellation that
has arrived takes effect before the next step. An idle engine waits for a message and costs nothing.

How it ends                    | what becomes of accepted requests            | `serve`
-------------------------------|----------------------------------------------|--------------------
the supervisor is gone         | cancelled, their blocks given back           | returns
the engine raises              | nothing; `EngineFailed` was said             | raises that
the supervisor talks nonsense  | cancelled, their blocks given back           | raises ProtocolError
"""

from __future__ import annotations

import asyncio
from collections import deque

from headrace.engine import Engine, StepPlan, StepResult, num_samples
from headrace.protocol.channel import Channel
from headrace.protocol.engine_messages import (
    Accepted,
    Continue,
    EngineFailed,
    EngineReady,
    FromEngine,
    Ping,
    Pong,
    PoolInfo,
    Release,
    Stepped,
    ToEngine,
)
from headrace.protocol.handoff import HandoffEvent, Held, Leg
from headrace.protocol.messages import (
    Cancel,
    EngineInfo,
    KVEvents,
    SequenceTimes,
    StartFailed,
    StepStats,
    Submit,
)
from headrace.protocol.requests import SequenceOutput
from headrace.worker.kv_report import KVReport
from headrace.worker.times import Stopwatch
from headrace.world import ConnectionLost, World

CONNECT_TIMEOUT_S = 10.0

INBOX_TURNS = 3
"""Turns of the event loop between two steps: one reads sockets, one wakes the reader, one fills the inbox."""


async def serve(
    world: World, address: str, engine: Engine, info: EngineInfo, pool: PoolInfo | None = None
) -> None:
    """Dial the supervisor at `address` and run its requests until one of the ends in the table above.

    `pool` says where the supervisor finds the KV blocks. Raises ConnectFailed when nobody answers there.
    """
    channel = await _dial(world, address)
    try:
        await _Loop(world, channel, engine).run(EngineReady(info, pool))
    finally:
        channel.abort()


async def report_start_failure(world: World, address: str, message: str) -> None:
    """Tell the supervisor at `address` why there will be no engine."""
    channel = await _dial(world, address)
    channel.post(StartFailed(message))
    await channel.close()


async def _dial(world: World, address: str) -> Channel[ToEngine]:
    connection = await world.network.connect(address, timeout_s=CONNECT_TIMEOUT_S)
    return Channel(connection, receives=ToEngine)


class _Loop:
    def __init__(self, world: World, channel: Channel[ToEngine], engine: Engine) -> None:
        self._world = world
        self._channel = channel
        self._engine = engine
        self._inbox: deque[ToEngine] = deque()  # bounded by what gateways may have open here
        self._arrived = asyncio.Event()
        self._gone = False
        self._released = False
        self._open: dict[str, set[int]] = {}  # samples of accepted requests that have not ended
        self._times = Stopwatch()
        self._last_step = 0
        self._taken: list[str] = []
        self._kv = KVReport(engine.scheduler.cache.told_group)
        self._kv_changed: KVEvents | None = None

    async def run(self, ready: EngineReady) -> None:
        reader = asyncio.create_task(self._read(), name="engine.inbox")
        try:
            await self._say(ready)
            while not self._gone:
                self._take_in()
                if accepted := self._engine.take_handoffs():
                    self._post(Accepted(accepted))
                if self._engine.has_work:
                    await self._step()
                    for _ in range(INBOX_TURNS):
                        await asyncio.sleep(0)
                elif self._released:  # nothing steps, and still the numbers changed
                    await self._say(self._stepped([], self._stats(0.0, None), [], []))
                    self._released = False
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
            await self._abandon()
            await reader  # raises what was wrong with the last message, if that was the end
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    # ---- what comes in -------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                self._inbox.append(message)
                self._arrived.set()
        except ConnectionLost:
            return
        finally:
            self._gone = True
            self._arrived.set()

    def _take_in(self) -> None:
        engine = self._engine
        while self._inbox:
            match self._inbox.popleft():
                case Submit() as submit:
                    self._accept(submit)
                case Cancel(request_id=request_id, index=index):
                    engine.cancel(request_id, index)
                case Continue(request_id=request_id, imported=imported, generated=generated):
                    engine.begin(request_id, imported, generated)
                case Release(request_id=request_id):
                    engine.release(request_id)
                    self._released = True
                case Ping():
                    self._post(Pong(self._last_step))

    def _accept(self, submit: Submit) -> None:
        request, progress = submit.request, submit.progress
        self._world.trace("engine.accept", request.request_id, submit.leg)
        samples = 1 if submit.leg is Leg.EXPORT else num_samples(request)
        running = [index for index in range(samples) if index not in progress.ended]
        self._open[request.request_id] = set(running)
        self._taken.append(request.request_id)
        self._times.arrived(request.request_id, running, self._world.now())
        self._engine.add(request, progress, submit.leg, submit.offload_above)

    # ---- what goes out -------------------------------------------------------------------------------

    async def _step(self) -> None:
        began = self._world.now()
        try:
            outputs = await self._engine.step()
        except Exception as error:  # ends this process; the supervisor ends or moves what it had
            message = f"the engine failed with {type(error).__name__}: {error}; its log has the traceback"
            await self._say(EngineFailed(message))
            await self._channel.close()
            raise
        now = self._world.now()
        self._times.scheduled(self._engine.last_started, began)
        times = self._times.outputs(outputs, now)
        for output in outputs:
            if output.finish is not None:
                self._close(output)
        handoffs = self._engine.take_handoffs()
        for event in handoffs:
            if isinstance(event, Held):
                self._open.pop(event.request_id, None)
                self._times.left(event.request_id, 0)
        stats = self._stats(now - began, self._engine.last_step)
        await self._say(self._stepped(outputs, stats, times, handoffs))

    def _stepped(
        self,
        outputs: list[SequenceOutput],
        stats: StepStats,
        times: list[SequenceTimes],
        handoffs: list[HandoffEvent],
    ) -> Stepped:
        taken, self._taken = self._taken, []
        kv, self._kv_changed = self._kv_changed, None
        return Stepped(outputs, stats, times, handoffs, taken, kv)

    async def _say(self, message: FromEngine) -> None:
        """Send, and wait while the supervisor reads more slowly than the engine computes."""
        try:
            await self._channel.send(message)
        except ConnectionLost:
            self._gone = True

    def _post(self, message: FromEngine) -> None:
        try:
            self._channel.post(message)
        except ConnectionLost:
            self._gone = True

    def _close(self, output: SequenceOutput) -> None:
        self._world.trace("engine.end", output.request_id, output.index)
        samples = self._open.get(output.request_id, set())
        samples.discard(output.index)
        if not samples:
            self._open.pop(output.request_id, None)

    async def _abandon(self) -> None:
        """Nobody listens any more: end everything, so that the engine is left with nothing held."""
        for request_id in list(self._open):
            self._engine.cancel(request_id)
        while self._engine.has_work:
            await self._engine.step()
            self._engine.take_handoffs()

    def _stats(self, step_s: float, last: tuple[StepPlan, StepResult] | None) -> StepStats:
        scheduler = self._engine.scheduler
        pool, counters = scheduler.cache.pool, scheduler.counters
        self._kv_changed = self._kv.take(pool.take_events())
        tokens = sampled = rows = 0
        kernel_s = 0.0
        if last is not None:
            plan, result = last
            self._last_step = plan.number
            tokens, rows, kernel_s = plan.tokens, len(plan.rows), result.kernel_s
            sampled = sum(map(len, result.tokens))
        return StepStats(
            step=self._last_step,
            tokens=tokens,
            sampled=sampled,
            rows=rows,
            step_s=step_s,
            kernel_s=kernel_s,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            queued_tokens=scheduler.queued_tokens,
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_held=pool.held,
            blocks_leased=pool.leased,
            blocks_quarantined=pool.quarantined,
            held_tokens=scheduler.held_tokens,
            preemptions=counters.preemptions,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            evictions=self._kv.evictions,
        )
