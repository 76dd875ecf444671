"""Many prompts to texts on an engine of their own, without HTTP: what `headrace generate` runs.

The same gateway, engine process and text as the server's. As many prompts are in flight as the engine runs at
once and as many again waiting, so that it never idles; results come out in order.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.api.errors import ApiError
from headrace.api.sample import Sample, TextOptions
from headrace.api.served import ServedModel
from headrace.api.workers import Pools, launchers
from headrace.cluster import LocalCluster
from headrace.config import EngineOptions
from headrace.config.engine import CACHE_KEY_BYTES
from headrace.engine import RequestRefused
from headrace.protocol.requests import SEED_LIMIT, GenerateRequest, SamplingParams
from headrace.store import ModelFiles
from headrace.text import TextError
from headrace.worker.process import ENGINE_COMMAND
from headrace.world import real_world

Prompt = str | list[dict[str, Any]]
"""Text to continue, or the messages of a conversation to answer."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one prompt; `error` says why nothing did."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"index": self.index, "error": self.error}
        return {
            "index": self.index,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


class Batch:
    """One model, and the sampling that all prompts share."""

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int | None,
        say: Callable[[str], None],
        engine_command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        """`say` gets what the engine's process prints."""
        self._world = real_world()
        self._files = files
        started = launchers(
            Pools(), options, say, cache_key=os.urandom(CACHE_KEY_BYTES), engine_command=engine_command
        )
        self._cluster = LocalCluster(self._world, started, report=say)
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seed = seed
        self._in_flight = 2 * options.max_num_seqs

    async def run(
        self, prompts: Sequence[Prompt], show: Callable[[Result], None], advance: Callable[[float], None]
    ) -> None:
        """Call `show` for each result, in order, and `advance` with tokens per second as each one ends.

        Raises StartFailedError or WorkerLostError when there is no engine to run on, TextError when the
        model's text cannot be read.
        """
        limit = asyncio.Semaphore(self._in_flight)
        try:
            starting = asyncio.create_task(self._cluster.start(), name="engine start")
            try:
                self._model = await asyncio.to_thread(ServedModel.from_files, self._files)
                await starting
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            self._began_s, self._tokens = time.monotonic(), 0
            tasks = [
                asyncio.create_task(self._one(index, prompt, limit, advance))
                for index, prompt in enumerate(prompts)
            ]
            try:
                for task in tasks:
                    show(await task)
            finally:  # not a TaskGroup: what `show` raises is for the caller, as it is
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._cluster.stop()

    async def _one(
        self, index: int, prompt: Prompt, limit: asyncio.Semaphore, advance: Callable[[float], None]
    ) -> Result:
        async with limit:
            try:
                result = await self._generate(index, prompt)
            except (RequestRefused, TextError, ApiError) as error:
                result = Result(index, error=str(error))
        self._tokens += result.completion_tokens
        advance(self._tokens / (time.monotonic() - self._began_s))
        return result

    async def _generate(self, index: int, prompt: Prompt) -> Result:
        tokens = await self._encode(prompt)
        recommended = self._model.sampling_defaults
        sampling = SamplingParams(
            max_tokens=self._max_tokens,
            **{
                **recommended,
                "temperature": recommended.get("temperature", 1.0)
                if self._temperature is None
                else self._temperature,
            },
            seed=self._world.random.stream("seeds").getrandbits(64)
            if self._seed is None
            else self._seed % SEED_LIMIT,
        )
        sample = Sample(self._model.tokenizer, TextOptions())
        text = ""
        request = GenerateRequest(request_id=str(index), prompt=tokens, sampling=sampling)
        with self._cluster.gateway.submit(request) as stream:
            async for outputs in stream:
                for output in outputs:
                    if output.finish is not None and output.finish.error is not None:
                        raise ApiError.of(output.finish.error)
                    text += sample.push(output).text
        return Result(index, text, sample.finish_reason, len(tokens), sample.tokens)

    async def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return await self._model.encode(prompt)
        if self._model.chat_template is None:
            raise TextError(f"the model {self._model.name!r} has no chat template; leave out --chat")
        text = self._model.chat_template.render(prompt)
        return await self._model.encode(text, add_special_tokens=False)
