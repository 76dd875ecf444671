"""An engine in this process as a target: no HTTP, no other process, the engine's own speed.

In: turns. Out: records with the tokens of each step. The engine steps on the run's own thread, so a request
that falls due during a step is taken in after it, as a worker does between two steps; its latency counts
from when it was due. Nothing here imports torch: the engine is handed in.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from headrace.bench.errors import FailureKind, RequestFailed
from headrace.bench.http import Clock
from headrace.bench.record import Counted, Record
from headrace.bench.target import Answer, Target, Turn
from headrace.engine import Engine
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams, SequenceOutput
from headrace.text import ChatTemplate, TextError, Tokenizer

DEFAULT_MAX_TOKENS = 64

TURNS_BETWEEN_STEPS = 5
"""Turns of the event loop: from an ended request to the one that takes its place, through slot, schedule
and task.
"""


@dataclass(slots=True, eq=False)
class _Open:
    """A request that the engine has."""

    record: Record
    done: asyncio.Future[None]
    token_ids: list[int] = field(default_factory=list)


class EngineTarget(Target):
    """Turns on an engine."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        temperature: float = 0.0,
        ignore_eos: bool = True,
        now: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        """`tokenizer` and `chat_template` are for workloads of text and of messages."""
        self.name = f"{name} in this process"
        self.sends = False
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._temperature = temperature
        self._ignore_eos = ignore_eos
        self._now = now
        self._cpu_clock = cpu_clock
        self._open: dict[str, _Open] = {}
        self._arrived = asyncio.Event()
        self._stepper: asyncio.Task[None] | None = None

    async def send(self, turn: Turn, record: Record) -> Answer:
        if self._stepper is None:
            self._stepper = asyncio.create_task(self._step_on(), name="bench.engine")
        if self._stepper.done():
            raise RequestFailed(FailureKind.CONNECT, "the engine has failed")
        request_id = f"bench-{record.number}"
        request = GenerateRequest(
            request_id=request_id,
            prompt=self._tokens(turn),
            sampling=SamplingParams(
                max_tokens=turn.max_tokens if turn.max_tokens is not None else DEFAULT_MAX_TOKENS,
                temperature=self._temperature,
                ignore_eos=self._ignore_eos,
                seed=turn.seed or 0,
            ),
        )
        record.sent_s = record.ready_s
        record.input_tokens = len(request.prompt)
        record.counted = Counted.IDS
        entry = self._open[request_id] = _Open(record, asyncio.get_running_loop().create_future())
        self._engine.add(request)
        self._arrived.set()
        try:
            await entry.done
        finally:
            if self._open.pop(request_id, None) is not None:
                self._engine.cancel(request_id)
        # only a chat goes on from text; decoding would be work beside the engine's
        if turn.messages is None or self._tokenizer is None:
            return Answer(token_ids=entry.token_ids)
        return Answer(self._tokenizer.decode(entry.token_ids), entry.token_ids)

    async def close(self) -> None:
        """Stop stepping. Raises what the engine raised."""
        stepper, self._stepper = self._stepper, None
        if stepper is None:
            return
        if not stepper.done():
            stepper.cancel()
        (outcome,) = await asyncio.gather(stepper, return_exceptions=True)
        self._engine.executor.close()
        if isinstance(outcome, Exception):
            raise outcome

    def _tokens(self, turn: Turn) -> list[int]:
        if turn.messages is None and not isinstance(turn.prompt, str):
            return list(turn.prompt or ())
        try:
            if self._tokenizer is None or (turn.messages is not None and self._chat_template is None):
                raise TextError("the model has no chat template, and takes token ids or plain text only")
            if turn.messages is not None and self._chat_template is not None:
                text = self._chat_template.render(turn.messages)
                return self._tokenizer.encode(text, add_special_tokens=False)
            return self._tokenizer.encode(str(turn.prompt))
        except TextError as error:
            raise RequestFailed(FailureKind.REFUSED, str(error)) from None

    async def _step_on(self) -> None:
        try:
            while True:
                if not self._engine.has_work:
                    self._arrived.clear()
                    await self._arrived.wait()
                before = self._cpu_clock()
                outputs = await self._engine.step()
                self.served_cpu_s += self._cpu_clock() - before
                at = self._now()
                for output in outputs:
                    self._deliver(output, at)
                for _ in range(TURNS_BETWEEN_STEPS):
                    await asyncio.sleep(0)
        finally:
            for request_id in list(self._open):
                self._end(request_id, RequestFailed(FailureKind.DISCONNECTED, "the engine has stopped"))

    def _deliver(self, output: SequenceOutput, at: float) -> None:
        entry = self._open.get(output.request_id)
        if entry is None:
            return
        record = entry.record
        if output.cached_tokens is not None:
            record.cached_tokens = output.cached_tokens
        if output.tokens:
            record.times.append(at)
            record.sizes.append(len(output.tokens))
            record.output_tokens += len(output.tokens)
            entry.token_ids += output.tokens
        if output.finish is None:
            return
        record.finish_reason = output.finish.reason
        error = output.finish.error
        if error is not None or output.finish.reason is FinishReason.ERROR:
            message = error.message if error is not None else "the engine gave no reason"
            self._end(output.request_id, RequestFailed(FailureKind.REFUSED, message))
        elif not record.times:
            self._end(output.request_id, RequestFailed(FailureKind.EMPTY, "the answer had no token"))
        else:
            self._end(output.request_id, None)

    def _end(self, request_id: str, error: RequestFailed | None) -> None:
        entry = self._open.pop(request_id)
        if entry.done.done():
            return
        if error is None:
            entry.done.set_result(None)
        else:
            entry.done.set_exception(error)
