"""Output tokens per second of the engine alone, and the share of a step that is not a kernel.

In one process, without HTTP: batches of 1, 8 and 32 sequences, each with 64 random prompt tokens and 64
output tokens, medians over repetitions. A step splits into kernels (seconds inside `Kernels`) and the rest:
planning, gathering the batch, sampling, committing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.config.engine import EngineOptions, usable_cores
from headrace.engine import Engine
from headrace.execution.build import build_engine
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.store import resolve

PROMPT_TOKENS = OUTPUT_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """One batch run to its end. Times in seconds, rates in output tokens per second."""

    batch: int
    tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_s: float
    decode_kernel_s: float

    @property
    def other_s(self) -> float:
        return self.decode_step_s - self.decode_kernel_s


async def run_batch(engine: Engine, batch: int, vocab_size: int, seed: int) -> Measured:
    """Submit `batch` requests at once and step until all have ended."""
    generator = random.Random(seed)
    for i in range(batch):
        prompt = [generator.randrange(vocab_size) for _ in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        engine.add(GenerateRequest(request_id=f"{seed}-{i}", prompt=prompt, sampling=sampling))
    steps: list[tuple[float, float]] = []
    began = time.perf_counter()
    while engine.has_work:
        before = time.perf_counter()
        await engine.step()
        if engine.last_step is not None and engine.last_step[0].tokens == batch:
            steps.append((time.perf_counter() - before, engine.last_step[1].kernel_s))
    total = time.perf_counter() - began
    step_s = statistics.median(step for step, _ in steps)
    kernel_s = statistics.median(kernel for _, kernel in steps)
    return Measured(batch, batch * OUTPUT_TOKENS / total, batch / step_s, step_s, kernel_s)


def median(runs: list[Measured]) -> Measured:
    """The run whose throughput is the median."""
    return sorted(runs, key=lambda run: run.tokens_per_s)[len(runs) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--quantization", default="none", choices=["none", "int8"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "native", "reference"])
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    files = resolve(arguments.model)
    options = EngineOptions(
        directory=str(files.directory),
        served_name=files.name,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        kernels=arguments.kernels,
        batch_invariant=arguments.batch_invariant,
        threads=arguments.threads or usable_cores(),
        max_model_len=1024,
        prefix_caching=False,
    )
    built = build_engine(options)
    engine, info = built.engine, built.info
    asyncio.run(run_batch(engine, 2, info.vocab_size, seed=0))
    runs = [
        median(
            [
                asyncio.run(run_batch(engine, batch, info.vocab_size, seed=1000 * batch + i))
                for i in range(arguments.repeat)
            ]
        )
        for batch in arguments.batches
    ]

    table = Table(title=f"{info.model}, {info.numerics}, {info.threads} threads, 64 tokens in and 64 out")
    for column in ("batch", "tok/s", "decode tok/s", "step ms", "kernels ms", "rest ms", "rest %"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            str(run.batch),
            f"{run.tokens_per_s:.0f}",
            f"{run.decode_tokens_per_s:.0f}",
            f"{run.decode_step_s * 1e3:.2f}",
            f"{run.decode_kernel_s * 1e3:.2f}",
            f"{run.other_s * 1e3:.2f}",
            f"{100 * run.other_s / run.decode_step_s:.1f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
