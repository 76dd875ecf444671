"""`headrace simulate fleet`: a cluster on modelled hardware under a trace, in virtual time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.http_options import say
from headrace.cli.journeys import journey_lines

if TYPE_CHECKING:
    from headrace.cluster.options import ServiceLevels
    from headrace.sim.fleet_result import FleetResult, Served
    from headrace.sim.trace import Arrival

CACHE_TOKENS = 1_000_000
MAX_MODEL_LEN = 131_072
STRIDE = 4
PROGRESS_S = 2.0
SHARES = (0.5, 0.9, 0.99)


def fleet(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A Mooncake (JSON lines) or Azure (CSV) trace.", show_default="made-up conversations"
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=2, help="The first so many requests.")] = 1000,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second: all gaps are changed alike.", show_default="the trace's"),
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="a100, h100, h200, or a file of `headrace calibrate`.")
    ] = "h100",
    model: Annotated[
        str | None,
        typer.Option(
            help="llama-70b, llama-8b, smollm2-135m.", show_default="llama-70b, or the calibrated one"
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of each worker, with tensor parallelism.", show_default="as memory asks for"
        ),
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(min=0, help="Workers that prefill.", show_default="the file's, or 0")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(min=0, help="Workers that decode.", show_default="the file's, or 0")
    ] = None,
    both: Annotated[
        int | None, typer.Option(min=0, help="Workers that do both.", show_default="the file's, or 0")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML of a cluster; what has no meaning here is said.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A field of that file, as in slo.ttft_ms=2000.",
            show_default=False,
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="That a worker's KV cache holds.", show_default="the file's memory, or 1000000"
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Positions of a KV block.", show_default="the file's, or 512")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longer requests of the trace are left out.", show_default="the file's, or 131072"
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences that run at once on a worker.", show_default="the file's, or 256"
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a step.", show_default="the file's, or 8192")
    ] = None,
    nic: Annotated[
        float | None,
        typer.Option(
            help="GB/s of a worker's network adapters, each way.", show_default="the hardware's, or 1.1"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decode steps that are run as one: 1 is exact, 4 three times as quick.",
            show_default="4, or 1 where admission foresees",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of made-up conversations, and of all chance.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write every request here.", show_default=False)
    ] = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQUEST",
            help="Say what happened to this request, by its name or its session's; can be given again.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the real gateway, routing, schedulers and handoffs on modelled hardware, under a trace.

    Says TTFT and TPOT, goodput, hit rate and utilisation as they would be, and how far to trust that. A
    thousand requests of some thousand tokens take half a minute or more.
    """
    with clear_errors():
        from headrace.cli.fleet_file import Asked
        from headrace.sim.fleet import FleetOptions, simulate
        from headrace.sim.fleet_setup import choose_worker

        if json_file is not None and not json_file.parent.is_dir():
            raise ValueError(f"cannot write {json_file}: there is no directory {json_file.parent}")
        counts = {"prefill": prefill, "decode": decode, "both": both}
        asked = Asked.of(config, set_ or [], counts)
        if asked.without_meaning:
            fields = ", ".join(asked.without_meaning)
            say(f"note: {config or '--set'}: no meaning in a simulation: {fields}")
        admission = asked.gateway.admission
        foresees = admission.early_rejection or bool(admission.degrade)
        steps = stride or (1 if foresees else STRIDE)
        tokens = cache_tokens
        if tokens is None and asked.kv_cache_bytes is not None:
            # How much a token takes depends on the model alone, and how many devices there are on this.
            per_token = choose_worker(hardware, model, devices, 1).cost.shape.kv_bytes
            tokens = max(1, int(asked.kv_cache_bytes / per_token))
        tokens = CACHE_TOKENS if tokens is None else tokens
        worker = choose_worker(hardware, model, devices, tokens)
        longest = min(max_model_len or asked.max_model_len or MAX_MODEL_LEN, worker.cost.shape.max_positions)
        given: dict[str, Any] = {
            "block_size": block_size or asked.block_size,
            "max_num_seqs": max_num_seqs or asked.max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens or asked.max_num_batched_tokens,
            "max_waiting": asked.max_waiting,
        }
        options = FleetOptions(
            cost=worker.cost,
            prefill=asked.pools["prefill"],
            decode=asked.pools["decode"],
            both=asked.pools["both"],
            cache_tokens=tokens,
            max_model_len=longest,
            reuse_prefix=asked.reuse_prefix,
            stride=steps,
            nic_bytes_per_s=nic * 1e9 if nic is not None else worker.nic_bytes_per_s,
            gateway=asked.gateway,
            seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )
        arrivals = _arrivals(trace, requests, rate, longest, seed)
        chosen = _named(arrivals, explain or [])
        said = time.monotonic()

        def heard(ended: int) -> None:
            nonlocal said
            if time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                print(f"{ended} of {len(arrivals)} requests", file=sys.stderr, flush=True)

        result = simulate(arrivals, options, heard=heard, explain=chosen)
        limits = [*worker.limits(tokens, steps), *_stride_words(stride, steps, foresees)]
        slo = asked.gateway.slo
        for line in [*_figures(result, slo), "", "What this rests on:", *(f"  {line}" for line in limits)]:
            print(line)
        journeys = _journeys(result, options.cost.shape.kv_bytes * options.block_size)
        for journey in journeys:
            print("", *journey_lines(journey), sep="\n")
        if json_file is not None:
            found = {**_as_json(result, slo), "journeys": journeys}
            json_file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _stride_words(asked: int | None, steps: int, foresees: bool) -> list[str]:
    """What a stride does to admission, which foresees waits by how long steps take."""
    if not foresees:
        return []
    if steps == 1:
        return [] if asked else ["decode steps run one by one, for admission foresees by how long they take"]
    return [
        f"with --stride {steps} steps look {steps} times as long to admission, which refuses and degrades by "
        "them (qos.enable_early_rejection, qos.degrade): leave --stride out, or give 1"
    ]


def _named(arrivals: Sequence[Arrival], names: list[str]) -> set[str]:
    """The requests that are meant, each by its own name, or all of a session by its. Raises ValueError."""
    found = set()
    for name in names:
        those = {one.name for one in arrivals if name in (one.name, one.session)}
        if not those:
            raise ValueError(
                f"--explain {name}: there is no such request among the {len(arrivals)} from "
                f"{arrivals[0].name} to {arrivals[-1].name}"
            )
        found |= those
    return found


def _arrivals(
    trace: Path | None, count: int, rate: float | None, max_length: int, seed: int
) -> list[Arrival]:
    from headrace.sim.trace import Sessions, at_rate, read_arrivals

    if trace is None:
        arrivals = Sessions().arrivals(count, seed, max_length)
    else:
        arrivals = read_arrivals(trace, max_length)[:count]
    if not arrivals:
        raise ValueError(f"no request of {trace} fits into {max_length} tokens")
    return arrivals if rate is None else at_rate(arrivals, rate)


# ---- what is said ------------------------------------------------------------------------------------------


def _figures(result: FleetResult, slo: ServiceLevels) -> list[str]:
    from headrace.protocol.messages import Role

    def spread(name: str, of: Any, scale: float, unit: str) -> str:
        values = result.quantiles(of, SHARES)
        text = "  ".join(
            f"p{100 * share:g} {value * scale:.5g}" for share, value in zip(SHARES, values, strict=True)
        )
        return f"  {name:12}{text} {unit}"

    roles = [role for role in Role if any(use.role is role for use in result.workers.values())]
    busy = ", ".join(f"{role} {100 * result.utilisation(role):.0f}%" for role in roles)
    done = sum(one.complete for one in result.requests)
    sent = sum(use.sent_bytes for use in result.workers.values())
    preemptions = sum(use.preemptions for use in result.workers.values())
    goodput, attained = (measure(slo.ttft_s, slo.tpot_s) for measure in (result.goodput, result.attainment))
    asked = len(result.requests)
    return [
        f"{asked} requests in {result.duration_s:.0f} s, {asked / result.span_s:.2f} a second; "
        f"{done} answered, {asked - done} refused or failed; simulated in {result.cpu_s:.0f} s of CPU",
        spread("TTFT", _ttft, 1e3, "ms"),
        spread("TPOT", _tpot, 1e3, "ms"),
        spread("whole", _whole, 1.0, "s"),
        f"  goodput     {goodput:.2f} requests a second, {100 * attained:.1f}% of them, within TTFT "
        f"{slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms",
        f"  cache       {100 * result.hit_rate:.1f}% of prompt tokens were found",
        f"  offloaded   {100 * result.offloaded:.1f}% of requests; {sent / 1e9:.1f} GB of KV blocks sent",
        f"  busy        {busy}; {preemptions} preemptions",
    ]


def _ttft(one: Served) -> float:
    return one.ttft_s


def _tpot(one: Served) -> float:
    return one.tpot_s


def _whole(one: Served) -> float:
    return one.e2e_s


def _as_json(result: FleetResult, slo: ServiceLevels) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "duration_s": result.duration_s,
        "slo": asdict(slo),
        "goodput": result.goodput(slo.ttft_s, slo.tpot_s),
        "attainment": result.attainment(slo.ttft_s, slo.tpot_s),
        "hit_rate": result.hit_rate,
        "offloaded": result.offloaded,
        "workers": {name: asdict(use) for name, use in result.workers.items()},
        "requests": [_request(one) for one in result.requests],
    }


def _journeys(result: FleetResult, block_bytes: float) -> list[dict[str, Any]]:
    """As a server tells them; blocks, of one byte each in the simulation, as what they stand for."""
    journeys = [journey.as_json() for journey in result.journeys]
    for event in (event for journey in journeys for event in journey["events"]):
        if "bytes" in event["detail"]:
            event["detail"]["bytes"] = round(event["detail"]["blocks"] * block_bytes)
    return journeys


def _request(one: Served) -> dict[str, Any]:
    """JSON has no infinity: a request without a token has no times."""
    from dataclasses import asdict
    from math import isfinite

    return {
        name: value if not isinstance(value, float) or isfinite(value) else None
        for name, value in asdict(one).items()
    }
