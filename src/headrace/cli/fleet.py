"""`headrace simulate fleet`: a cluster on modelled hardware under a trace, in virtual time."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.errors import clear_errors

if TYPE_CHECKING:
    from headrace.cluster.options import GatewayOptions, ServiceLevels
    from headrace.sim.fleet_result import FleetResult, Served
    from headrace.sim.trace import Arrival

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
        typer.Option(
            help="YAML of a cluster: its pools, split_policy, routing, slo and qos.", show_default=False
        ),
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
    cache_tokens: Annotated[int, typer.Option(min=1, help="That a worker's KV cache holds.")] = 1_000_000,
    block_size: Annotated[int, typer.Option(min=1, help="Positions of a KV block.")] = 512,
    max_model_len: Annotated[
        int, typer.Option(min=2, help="Longer requests of the trace are left out.")
    ] = 131_072,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once on a worker.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 8192,
    nic: Annotated[
        float | None,
        typer.Option(
            help="GB/s of a worker's network adapters, each way.", show_default="the hardware's, or 1.1"
        ),
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="Decode steps that are run as one: 1 is exact, 4 three times as quick.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of made-up conversations, and of all chance.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write every request here.", show_default=False)
    ] = None,
) -> None:
    """Run the real gateway, routing, schedulers and handoffs on modelled hardware, under a trace.

    Says TTFT and TPOT, goodput, hit rate and utilisation as they would be, and how far to trust that. A
    thousand requests of some thousand tokens take half a minute or more.
    """
    with clear_errors():
        from headrace.sim.fleet import FleetOptions, simulate
        from headrace.sim.fleet_setup import choose_worker

        if json_file is not None and not json_file.parent.is_dir():
            raise ValueError(f"cannot write {json_file}: there is no directory {json_file.parent}")
        pools, gateway = _cluster(config, set_ or [], {"prefill": prefill, "decode": decode, "both": both})
        worker = choose_worker(hardware, model, devices, cache_tokens)
        max_model_len = min(max_model_len, worker.cost.shape.max_positions)
        options = FleetOptions(
            cost=worker.cost,
            prefill=pools["prefill"],
            decode=pools["decode"],
            both=pools["both"],
            cache_tokens=cache_tokens,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            stride=stride,
            nic_bytes_per_s=nic * 1e9 if nic is not None else worker.nic_bytes_per_s,
            gateway=gateway,
            seed=seed,
        )
        arrivals = _arrivals(trace, requests, rate, max_model_len, seed)
        said = time.monotonic()

        def heard(ended: int) -> None:
            nonlocal said
            if time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                print(f"{ended} of {len(arrivals)} requests", file=sys.stderr, flush=True)

        result = simulate(arrivals, options, heard=heard)
        limits = [f"  {line}" for line in worker.limits(cache_tokens, stride)]
        for line in [*_figures(result, gateway.slo), "", "What this rests on:", *limits]:
            print(line)
        if json_file is not None:
            json_file.write_text(json.dumps(_as_json(result, gateway.slo), indent=1) + "\n", "utf-8")


def _cluster(
    config: Path | None, overrides: list[str], counts: dict[str, int | None]
) -> tuple[dict[str, int], GatewayOptions]:
    """Workers by role, and the gateway; what the command line says goes before the file."""
    from headrace.api.options import gateway_options
    from headrace.config.reading import read_cluster
    from headrace.sim.fleet import PLANNED

    file = read_cluster(config, overrides)
    pools = {
        role: counts[role] if counts[role] is not None else replicas
        for role, replicas in file.replicas().items()
    }
    if not any(pools.values()):
        raise ValueError("there are no workers: ask for some, as in --prefill 8 --decode 8, or --both 8")
    gateway = replace(
        gateway_options(file, config),
        models=(),  # one is simulated, and made requests for
        aliases=(),
        heartbeat_s=PLANNED.heartbeat_s,
        suspect_after_s=PLANNED.suspect_after_s,
        lapse_s=PLANNED.lapse_s,
    )
    return {role: count or 0 for role, count in pools.items()}, gateway


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


def _request(one: Served) -> dict[str, Any]:
    """JSON has no infinity: a request without a token has no times."""
    from dataclasses import asdict
    from math import isfinite

    return {
        name: value if not isinstance(value, float) or isfinite(value) else None
        for name, value in asdict(one).items()
    }
