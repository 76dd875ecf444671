"""`headrace bench`: how a server, or an engine in this process, does under load."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.interrupts import INTERRUPTED
from headrace.config import EngineOptions, parse_size
from headrace.config.bench import (
    DEFAULT_CONCURRENCY,
    DEFAULT_INPUT_LEN,
    DEFAULT_OUTPUT_LEN,
    DEFAULT_PREFIX_LEN,
    DEFAULT_PREFIXES,
    DEFAULT_REQUESTS,
    DEFAULT_THINK_TIME_S,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TURNS,
    DEFAULT_URL,
    DEFAULT_VOCAB_SIZE,
    Dataset,
    LoadOptions,
    WorkloadOptions,
)

if TYPE_CHECKING:
    from headrace.bench.run import Load, Run
    from headrace.bench.summary import Context
    from headrace.bench.target import Target
    from headrace.bench.workload import Workload


def bench(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible address.", show_default=DEFAULT_URL)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model there.", show_default="the first it serves")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADRACE_API_KEY", help="Key to send.", show_default=False)
    ] = None,
    endpoint: Annotated[
        Literal["completions", "chat"],
        typer.Option(help="completions sends token ids where it can; chat sends messages."),
    ] = "completions",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Run this model in this process instead, without HTTP.", show_default=False
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An option of that engine, such as threads=2 or prefix_caching=false.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests (or sessions) sent per second.", show_default=False)
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            help="Shape of the gaps: 1 is Poisson, less is burstier, inf is even.", show_default="1"
        ),
    ] = None,
    ramp: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="A rate that changes linearly over the run.", show_default=False
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Requests (or sessions) under way at once: a closed loop alone, a limit beside a rate.",
            show_default=f"{DEFAULT_CONCURRENCY} without a rate",
        ),
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(help="Requests in all.", show_default=f"{DEFAULT_REQUESTS}, or the file's")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds after which nothing new is sent.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = DEFAULT_TIMEOUT_S,
    dataset: Annotated[Dataset, typer.Option(help="What is asked.")] = "random",
    path: Annotated[
        Path | None,
        typer.Option(
            help="For file: JSON lines with prompt or messages, and max_tokens. "
            "For trace: a Mooncake (JSON lines) or Azure (CSV) trace.",
            show_default=False,
        ),
    ] = None,
    input_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt.", show_default=str(DEFAULT_INPUT_LEN))
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(help="Tokens asked for.", show_default=str(DEFAULT_OUTPUT_LEN))
    ] = None,
    range_ratio: Annotated[
        float | None, typer.Option(help="Lengths vary by this share either way.", show_default="0")
    ] = None,
    prefixes: Annotated[
        int | None, typer.Option(help="shared-prefix: how many.", show_default=str(DEFAULT_PREFIXES))
    ] = None,
    prefix_len: Annotated[
        int | None, typer.Option(help="shared-prefix: tokens of each.", show_default=str(DEFAULT_PREFIX_LEN))
    ] = None,
    turns: Annotated[
        int | None, typer.Option(help="multi-turn: requests of a session.", show_default=str(DEFAULT_TURNS))
    ] = None,
    think_time: Annotated[
        float | None,
        typer.Option(
            help="multi-turn: mean seconds between an answer and the next turn.",
            show_default=f"{DEFAULT_THINK_TIME_S:g}",
        ),
    ] = None,
    time_scale: Annotated[
        float | None,
        typer.Option(help="trace: times are multiplied by this; 0 sends all at once.", show_default="1"),
    ] = None,
    max_input_len: Annotated[
        int | None, typer.Option(help="trace: longer prompts are clipped.", show_default=False)
    ] = None,
    max_output_len: Annotated[
        int | None, typer.Option(help="trace: longer outputs are clipped.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Random token ids are below this.", show_default=str(DEFAULT_VOCAB_SIZE)),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Have outputs as long as asked; OpenAI's own servers refuse the field.")
    ] = True,
    extra_body: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Fields for every body; null removes one.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes lengths, prompts and arrivals.")] = 0,
    slo: Annotated[
        str | None,
        typer.Option(help="Report goodput under this, such as ttft=200ms,tpot=50ms.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latencies and throughput over time.", show_default=False)
    ] = None,
    save_requests: Annotated[
        Path | None, typer.Option(help="Write a JSON line for each request.", show_default=False)
    ] = None,
) -> None:
    """Send load, and report latencies, throughput and goodput. Ctrl-C reports what was measured so far."""
    with clear_errors():
        import uvloop
        from rich.console import Console

        from headrace.bench.errors import BenchError
        from headrace.bench.plot import check_plot, write_plot
        from headrace.bench.report import print_summary, write_json, write_requests
        from headrace.bench.setup import build_load, build_workload
        from headrace.bench.summary import Context, Objectives, summarise
        from headrace.bench.workload import Form

        objectives = None if slo is None else Objectives.parse(slo)
        if plot is not None:
            check_plot(plot)
        for file in (json_file, plot, save_requests):
            if file is not None and not file.parent.is_dir():
                raise BenchError(f"cannot write {file}: there is no directory {file.parent}")
        if engine is not None:
            for name, given in (("--url", url), ("--model", model), ("--extra-body", extra_body)):
                if given is not None:
                    raise BenchError(f"{name} has no meaning with --engine, which sends nothing over HTTP")
        elif set_:
            raise BenchError("--set has no meaning without --engine; a server has its own options")
        extra = _extra(extra_body)

        workload = build_workload(
            WorkloadOptions(
                dataset=dataset,
                input_len=input_len,
                output_len=output_len,
                range_ratio=range_ratio,
                vocab_size=vocab_size,
                prefixes=prefixes,
                prefix_len=prefix_len,
                turns=turns,
                think_time=think_time,
                path=path,
                time_scale=time_scale,
                max_input_len=max_input_len,
                max_output_len=max_output_len,
            ),
            Form.MESSAGES if endpoint == "chat" else Form.TOKENS,
            seed,
        )
        load, words = build_load(
            LoadOptions(
                rate=rate,
                burstiness=burstiness,
                ramp=ramp,
                concurrency=concurrency,
                num_requests=num_requests,
                duration=duration,
                timeout=timeout,
            ),
            workload,
            seed,
        )

        async def measure() -> tuple[Run, Context]:
            target = (
                await _address(
                    url or DEFAULT_URL, model, api_key, endpoint, temperature, ignore_eos, extra, workload
                )
                if engine is None
                else _engine(engine, set_ or [], temperature, ignore_eos)
            )
            date = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                run = await _run(target, workload, load)
            finally:
                await target.close()
            context = Context(
                target=target.name,
                workload=workload.description,
                load=words,
                seed=seed,
                date=date,
                scheduled=load.due is not None,
                sends=target.sends,
                objectives=objectives,
            )
            return run, context

        run, context = uvloop.run(measure())
        summary = summarise(
            run.records,
            context,
            duration_s=run.elapsed_s,
            cpu_s=run.cpu_s,
            most_running=run.most_running,
            unsent=run.unsent,
            interrupted=run.interrupted,
            notes=workload.notes(),
        )
        print_summary(summary, Console(highlight=False))
        if json_file is not None:
            write_json(summary, json_file)
        if save_requests is not None:
            write_requests(run.records, run.began_s, save_requests, objectives)
        if plot is not None:
            title = f"{summary.target}\n{summary.workload}; {summary.load}; seed {seed}"
            write_plot(run.records, run.began_s, run.elapsed_s, title, plot)
    if summary.interrupted:
        sys.exit(INTERRUPTED)
    if not summary.completed:
        sys.exit(1)


def _extra(text: str | None) -> dict[str, object]:
    try:
        extra = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ValueError(f"--extra-body must be a JSON object, got {text}")
    return extra


async def _address(
    url: str,
    model: str | None,
    api_key: str | None,
    endpoint: Literal["completions", "chat"],
    temperature: float,
    ignore_eos: bool,
    extra: dict[str, object],
    workload: Workload,
) -> Target:
    from headrace.bench.endpoint import EndpointTarget, OpenAIClient

    client = OpenAIClient(url, api_key=api_key)
    return EndpointTarget(
        client,
        await client.choose_model(model),
        endpoint,
        temperature=temperature,
        ignore_eos=ignore_eos,
        extra=extra,
        token_ids=workload.answers_needed,
    )


def _engine(model: str, settings: list[str], temperature: float, ignore_eos: bool) -> Target:
    from headrace.api.served import ServedModel
    from headrace.bench.inprocess import EngineTarget
    from headrace.cli.models import PullProgress
    from headrace.execution.build import build_engine
    from headrace.store import resolve

    with PullProgress() as progress:
        files = resolve(model, progress)
    built = build_engine(_engine_options(str(files.directory), files.name, settings))
    served = ServedModel.from_files(files)
    return EngineTarget(
        built.engine,
        f"{built.info.model}, {built.info.numerics}, {built.info.threads} threads,",
        tokenizer=served.tokenizer,
        chat_template=served.chat_template,
        temperature=temperature,
        ignore_eos=ignore_eos,
    )


def _engine_options(directory: str, name: str, settings: list[str]) -> EngineOptions:
    """Raises ValueError that names the setting."""
    import msgspec

    fields: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected is NAME=VALUE")
        fields[key] = parse_size(value) if key == "kv_cache_memory" else value
    try:
        return msgspec.convert(
            {**fields, "directory": directory, "served_name": name}, EngineOptions, strict=False
        )
    except msgspec.ValidationError as error:
        known = ", ".join(EngineOptions.__struct_fields__[2:])
        raise ValueError(f"--set: {error}; the options of an engine are {known}") from None


async def _run(target: Target, workload: Workload, load: Load) -> Run:
    from rich.console import Console

    from headrace.bench.progress import show
    from headrace.bench.run import Run

    run = Run(target, workload, load)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, run.stop)
    progress = asyncio.create_task(show(run, load.requests, Console(stderr=True)), name="bench.progress")
    await asyncio.sleep(0)  # the first line is drawn before the first request is due
    try:
        await run.run()
    finally:
        progress.cancel()
        await asyncio.gather(progress, return_exceptions=True)
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
    return run
