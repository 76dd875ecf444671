"""Headrace's engine in this process, stepped as its worker steps it."""

from __future__ import annotations

import asyncio
import itertools

import protocol
from headrace.config.engine import EngineOptions
from headrace.execution.build import build_engine
from headrace.protocol.requests import GenerateRequest, SamplingParams


def main() -> None:
    options = protocol.arguments()
    engine = build_engine(
        EngineOptions(
            directory=options.directory,
            served_name="model",
            dtype="bfloat16",
            quantization="int8" if options.precision == "int8" else "none",
            threads=options.threads,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=2048,  # for throughput, as the peers' offline engines are set up
            prefix_caching=False,
        )
    ).engine
    numbers = itertools.count()

    async def run(prompts: list[list[int]], output_tokens: int) -> int:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            engine.add(GenerateRequest(request_id=str(next(numbers)), prompt=prompt, sampling=sampling))
        tokens = 0
        while engine.has_work:
            tokens += sum(len(output.tokens) for output in await engine.step())
        return tokens

    with asyncio.Runner() as runner:
        protocol.serve(options.answers, lambda prompts, tokens: runner.run(run(prompts, tokens)))


if __name__ == "__main__":
    main()
