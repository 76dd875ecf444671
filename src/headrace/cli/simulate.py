"""`headrace simulate`: search seeded histories of a whole cluster under faults for broken promises."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.fleet import fleet
from headrace.cli.interrupts import leaving_on

if TYPE_CHECKING:
    from headrace.protocol.messages import Role
    from headrace.sim.search import Failure, Scope, Verdict

PROGRESS_S = 2.0
VIOLATIONS = 1
COUNT = 10
MAX_WORKERS = 64
AGAIN_EVERY = 10


app = typer.Typer(name="simulate", context_settings={"help_option_names": ["-h", "--help"]})
app.command()(fleet)


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    seeds: Annotated[
        str, typer.Option(metavar="A:B", help="Seeds A to B - 1, or one seed; each is one history.")
    ] = "0:100",
    faults: Annotated[
        str, typer.Option(help="`default` draws of all kinds, `none`, or kinds by name: crash,cut,drain.")
    ] = "default",
    count: Annotated[int, typer.Option(min=0, help="Faults drawn for each history.")] = COUNT,
    only: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Let only these of the drawn faults happen.", show_default="all"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML of a cluster: its pools.", show_default="several clusters"),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="`hash`, which shows every wrong block, or `torch` on a tiny model.")
    ] = "hash",
    again_every: Annotated[
        int,
        typer.Option(
            min=0, help="Run each history whose seed is a multiple of N twice: it must be the same."
        ),
    ] = AGAIN_EVERY,
    jobs: Annotated[int, typer.Option(min=1, help="Histories at a time, each in its process.")] = 1,
) -> None:
    """Run gateways, workers and transfers in virtual time, with hashes for a model, and break things.

    Every output must be what the request produces alone, every request must end once, and nothing may be
    left. Exit code 1 when that did not hold. With the command `fleet`: what a cluster would do on given
    hardware, with nothing broken.
    """
    if context.invoked_subcommand is not None:
        return
    with clear_errors(), leaving_on(signal.SIGTERM, signal.SIGHUP):
        from headrace.sim.search import search

        numbers, scope = _seeds(seeds), _scope(faults, count, only, config, executor)
        scope = replace(scope, again_every=again_every)
        began = time.monotonic()
        said = began

        def heard(verdict: Verdict) -> None:
            nonlocal said
            if time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                text = f"{verdict.seeds} of {len(numbers)} histories, {len(verdict.failures)} with violations"
                print(text, file=sys.stderr, flush=True)

        verdict = search(numbers, scope, jobs=jobs, heard=heard)
        options = "" if config is None else f" --config {shlex.quote(str(config))}"
        options += "" if faults == "default" else f" --faults {shlex.quote(faults)}"
        options += "" if count == COUNT else f" --count {count}"
        options += "" if executor == "hash" else f" --executor {executor}"
        options += "" if again_every == AGAIN_EVERY else f" --again-every {again_every}"
        for line in _verdict_lines(verdict, time.monotonic() - began, options):
            print(line)
        if verdict.failures:
            sys.exit(VIOLATIONS)


def _verdict_lines(verdict: Verdict, took_s: float, options: str) -> list[str]:
    """The verdict in words; `options` are those that a replay needs."""
    lines = [
        f"{verdict.seeds} histories, {len(verdict.failures)} with violations, in {took_s:.1f} s",
        f"  requests  {verdict.requests} accepted; sequences: {_counts(verdict.endings)}",
        f"  steps     {verdict.steps} in {verdict.virtual_s:.0f} s of virtual time{_least(verdict)}",
        f"  again     {verdict.again} lived twice, and were the same both times",
        f"  faults    {verdict.acted.total()} of {verdict.faults.total()} met something, by kind:",
    ]
    lines += [f"    {kind:14} {verdict.acted[kind]:6} of {n}" for kind, n in sorted(verdict.faults.items())]
    for failure in verdict.failures:
        lines += _failure_lines(failure, options)
    return lines


def _failure_lines(failure: Failure, options: str) -> list[str]:
    only = ",".join(map(str, failure.keep))
    least = f" --only {only}" if failure.keep else " --faults none"
    return [
        f"seed {failure.seed}: {failure.error.splitlines()[0]}",
        f"  replay    headrace simulate --seeds {failure.seed}{options}",
        f"  smallest  headrace simulate --seeds {failure.seed}{options}{least}",
        *(
            f"    at {fault.at_s:.3f} s  {fault.kind} {fault.where} {fault.other}".rstrip()
            + f"  (for {fault.for_s:g} s, amount {fault.amount})"
            for fault in failure.faults
        ),
    ]


def _least(verdict: Verdict) -> str:
    least = verdict.least
    return "" if least is None else f"; at least {least.steps} in each, as in seed {least.seed}"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _seeds(text: str) -> range:
    first, colon, end = text.partition(":")
    try:
        seeds = range(int(first), int(end)) if colon else range(int(first), int(first) + 1)
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; give one seed as in 7, or a range as in 0:1000") from None
    if not seeds or seeds[0] < 0:
        raise ValueError(f"--seeds {text} names no seed; give a range of numbers from 0 as in 0:1000")
    return seeds


def _scope(faults: str, count: int, only: str | None, config: Path | None, executor: str) -> Scope:
    from headrace.sim.faults import Kind
    from headrace.sim.search import Scope

    if faults == "default":
        kinds = tuple(Kind)
    elif faults == "none":
        kinds = ()
    else:
        names = {str(kind): kind for kind in Kind}
        wanted = [name.strip() for name in faults.split(",")]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"--faults: there is no {unknown[0]!r}; there are {', '.join(names)}")
        kinds = tuple(names[name] for name in wanted)
    keep = None
    if only is not None:
        try:
            keep = tuple(int(number) for number in only.split(","))
        except ValueError:
            raise ValueError(f"--only is {only!r}; give numbers as in 0,3") from None
        most = count if kinds else 0
        if any(not 0 <= number < most for number in keep):
            raise ValueError(f"--only {only}: {most} faults are drawn, numbered from 0")
    roles = None if config is None else tuple(_workers(config).items())
    if executor not in ("hash", "torch"):
        raise ValueError(f"--executor is {executor!r}; there are hash and torch")
    computes: Literal["hash", "torch"] = "torch" if executor == "torch" else "hash"
    return Scope(kinds, roles, count, keep, computes)


def _workers(config: Path) -> dict[str, Role]:
    """Workers by name, as a cluster's file counts them."""
    from headrace.config.reading import read_cluster
    from headrace.protocol.messages import Role

    counts = read_cluster(config).replicas()
    if sum(counts.values()) > MAX_WORKERS:
        raise ValueError(
            f"{config}: pools: {sum(counts.values())} workers, and a history has at most {MAX_WORKERS}; "
            "headrace simulate fleet takes more"
        )
    workers = {f"{role}{number}": role for role in Role for number in range(counts[role])}
    if not any(role.decodes for role in workers.values()):
        raise ValueError(f"{config}: pools: no worker decodes; add one, as in both: {{replicas: 1}}")
    return workers
