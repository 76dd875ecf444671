"""`headrace calibrate`: what this machine's engine reaches, for the simulation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.options import (
    DEFAULT_KV_CACHE_MEMORY,
    DEFAULTS,
    DtypeOption,
    KvCacheMemory,
    MaxModelLen,
    QuantizationOption,
    Threads,
)
from headrace.config import EngineOptions, parse_size

if TYPE_CHECKING:
    from headrace.execution.build import BuiltEngine
    from headrace.sim.cost.calibration import Calibration
    from headrace.sim.cost.fit import FitError, MeasuredStep
    from headrace.sim.cost.models import ModelShape

WRITTEN = 0x3C
"""What the KV cache is filled with: a small number in bfloat16 and in float32."""

UNSEEN = 1e17
"""Operations or bytes a second, far above what there is: no step showed any time for them."""

READ_BYTES = 512 << 20
"""More than caches hold of it while steps read their weights between."""

NOISY = 0.25
"""Mean error on steps that were not fitted above which a fit says little."""


def calibrate(
    model: Annotated[
        str, typer.Argument(help="A name, a directory, a GGUF file, or a hub id.")
    ] = "smollm2-135m",
    output: Annotated[
        Path, typer.Option(help="Where to write what was found; `simulate fleet --hardware` reads it.")
    ] = Path("calibration.json"),
    repeats: Annotated[int, typer.Option(min=1, help="Times that each step is run; the median counts.")] = 5,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Count seconds of CPU, where other work runs beside; with --threads 1 only."
        ),
    ] = False,
    dtype: DtypeOption = DEFAULTS.dtype,
    quantization: QuantizationOption = DEFAULTS.quantization,
    threads: Threads = DEFAULTS.threads,
    max_model_len: MaxModelLen = None,
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY,
) -> None:
    """Measure steps of MODEL's engine on this machine and fit the cost model of the simulation to them.

    A minute or less for the small models; best while nothing else runs. Prompts of several lengths, decodes
    of several batches and contexts, and both at once are run, and memory is read beside them; a third of the
    steps is kept back, to say how far predictions are off. The rates that come out are what the engine
    reaches, not what the machine could.
    """
    with clear_errors():
        import sys

        from headrace.cli.models import PullProgress
        from headrace.execution.build import build_engine
        from headrace.sim.cost.models import ModelShape
        from headrace.store import resolve

        if not output.parent.is_dir():
            raise ValueError(f"cannot write {output}: there is no directory {output.parent}")
        with PullProgress() as progress:
            files = resolve(model, progress)
        if cpu_time and threads != 1:
            raise ValueError("--cpu-time: threads wait for each other and compute meanwhile; add --threads 1")
        shape = ModelShape.from_config(files.name, files.config)  # refused before anything is loaded
        print(f"headrace: loading {files.name} …", file=sys.stderr, flush=True)
        built = build_engine(
            EngineOptions(
                directory=str(files.directory),
                served_name=files.name,
                dtype=dtype,
                quantization=quantization,
                threads=threads,
                max_model_len=max_model_len,
                kv_cache_memory=parse_size(kv_cache_memory),
                prefix_caching=False,
                shared_kv=True,
            )
        )
        try:
            clock = time.process_time if cpu_time else time.perf_counter
            found, steps = asyncio.run(_calibrate(built, shape, quantization == "int8", repeats, clock))
        finally:
            built.engine.executor.close()
        found.write(output)
        _print(found, steps)
        if found.held_out.mean > NOISY:
            print(
                "\nheadrace: do not trust these figures: steps took now long and now short, as they do "
                "beside other work; run it again while nothing else runs, or with --threads 1 --cpu-time",
                file=sys.stderr,
            )
        print(f"\nwritten to {output}; use it with: headrace simulate fleet --hardware {output}")


async def _calibrate(
    built: BuiltEngine, shape: ModelShape, int8: bool, repeats: int, clock: Callable[[], float]
) -> tuple[Calibration, list[MeasuredStep]]:
    from dataclasses import replace

    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from headrace.kernels.memory import memory_reader
    from headrace.sim.cost import StepCost
    from headrace.sim.cost.calibration import Calibration, grid, measure, measure_loop, split
    from headrace.sim.cost.fit import errors, fit

    info, engine = built.info, built.engine
    each = {"bfloat16": 2.0, "float32": 4.0}[info.dtype]
    shape = replace(shape, weight_bytes_each=1.0 if int8 else each, kv_bytes_each=each)
    if built.shared_kv is None:
        raise RuntimeError("the engine was built without memory that can be filled")
    # Memory that was never written is one page of zeros, and reading it would be too quick.
    np.frombuffer(built.shared_kv.buffer, np.uint8)[:] = WRITTEN
    wanted = grid(
        info.max_model_len,
        info.max_num_seqs,
        info.max_num_batched_tokens,
        (info.num_blocks - info.max_num_seqs) * info.block_size,
    )
    columns = (TextColumn("measuring steps"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(wanted) * (repeats + 1))
        steps, bytes_per_s = await measure(
            engine, wanted, repeats, clock, memory_reader(READ_BYTES), heard=lambda: progress.advance(task)
        )
    loop_step_s, loop_row_s = await measure_loop(engine, clock)
    fitted, held = split(steps)
    rates = fit(shape, fitted, bytes_per_s)
    cost = StepCost(shape, rates)
    found = Calibration(
        machine=f"{info.numerics}, {info.threads} threads",
        shape=shape,
        # What is outside of the executor is added after the fit, whose steps do not have it.
        rates=replace(rates, step_s=rates.step_s + loop_step_s, row_s=rates.row_s + loop_row_s),
        fitted=errors(cost, fitted),
        held_out=errors(cost, held),
        longest=max(new + context for step in steps for new, context in step.rows),
    )
    return found, [
        replace(step, seconds=step.seconds + loop_step_s + loop_row_s * len(step.rows)) for step in steps
    ]


def _print(found: Calibration, steps: list[MeasuredStep]) -> None:
    from rich.console import Console
    from rich.table import Table

    from headrace.sim.cost import StepCost

    cost = StepCost(found.shape, found.rates)
    table = Table(title=f"{found.shape.name} on {found.machine}")
    for column in ("rows", "new tokens", "context", "measured ms", "predicted ms", "off"):
        table.add_column(column, justify="right")
    for step in steps:
        contexts = sorted({context for _, context in step.rows})
        predicted = cost.seconds(step.rows)
        table.add_row(
            str(len(step.rows)),
            str(sum(new for new, _ in step.rows)),
            "/".join(map(str, contexts)),
            f"{step.seconds * 1e3:.2f}",
            f"{predicted * 1e3:.2f}",
            f"{100 * (predicted / step.seconds - 1):+.0f}%",
        )
    console = Console(highlight=False)
    console.print(table)
    rates = found.rates
    console.print(
        f"linear layers   {_rate(rates.linear_flops_per_s)} GFLOP/s\n"
        f"attention       {_rate(rates.attention_flops_per_s)} GFLOP/s\n"
        f"memory          {rates.bytes_per_s / 1e9:10.1f} GB/s, read beside the steps and not fitted\n"
        f"KV blocks       {_rate(rates.kv_bytes_per_s)} GB/s\n"
        f"overlap         {rates.overlap:10.0%} of the shorter of reading weights and multiplying\n"
        f"each step       {rates.step_s * 1e3:10.2f} ms\n"
        f"each row        {rates.row_s * 1e6:10.1f} µs\n"
        f"off by          {_off(found.held_out)} that were not fitted\n"
        f"                {_off(found.fitted)} that were"
    )


def _rate(of: float) -> str:
    """In billions a second."""
    return f"{of / 1e9:10.1f}" if of < UNSEEN else "  too many to be seen in these steps:"


def _off(error: FitError) -> str:
    mean, median, most = (f"{100 * share:.0f}%" for share in (error.mean, error.median, error.most))
    return f"{mean} in the mean, {median} in the median, {most} at most, on {error.steps} steps"
