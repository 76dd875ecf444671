"""What long prompts do to streams that decode, on one machine: two workers that do both, or one for each.

Every worker has one core. First, streams decode without a pause while long prompts arrive; the time of each
of their tokens is measured in

    alone         the streams at one worker, nothing else: no interference at all
    floor         the same, and the prompts at another, unconnected server: what the machine itself costs, as
                  memory and caches are shared
    together      two workers of role both; prompts are prefilled in chunks, between the streams' steps
    apart         one worker prefills, the other decodes

Then short and long requests come at a sweep of rates, to `together` and to `apart`: goodput is how many a
second keep both objectives. Where disaggregation does not pay, the last lines say so.

Nothing else should run on the machine; the load generator and the gateways share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from headrace.bench.arrivals import Rate, arrivals
from headrace.bench.endpoint import EndpointTarget, OpenAIClient
from headrace.bench.record import Record
from headrace.bench.run import Load, Run
from headrace.bench.summary import Objectives
from headrace.bench.workload import Form, Lengths, RandomWorkload, Stream, generator
from serving import Server

MODEL = "smollm2-135m"
WARM_S = 3.0
"""At the start of each measurement, which does not count."""
SHORT, ANSWER = 64, 64
"""Tokens of a short prompt, and of every answer of the sweep."""

APART = ("--prefill", "1", "--decode", "1")
TOGETHER = ("--both", "2")
ONE = ("--both", "1")


@dataclass(frozen=True)
class Part:
    """One of the loads that come together."""

    input_tokens: int
    output_tokens: int
    rate: float | None = None
    """Requests a second, a Poisson process; None: `streams` at a time, without a pause."""
    streams: int = 0
    seed: int = 0

    def run(self, url: str, model: str, seconds: float) -> Run:
        workload = RandomWorkload(
            self.seed, Form.TOKENS, Lengths(self.input_tokens, 0.2), Lengths(self.output_tokens)
        )
        rate = self.rate

        def due() -> Iterator[float]:
            assert rate is not None
            return arrivals(Rate.constant(rate), 1.0, generator(self.seed, Stream.ARRIVALS))

        load = Load(None if rate is None else due, None if rate else self.streams, duration_s=seconds)
        target = EndpointTarget(OpenAIClient(url), model, "completions", token_ids=False)
        return Run(target, workload, load)


async def measure(parts: Sequence[tuple[str, Part]], seconds: float) -> list[list[Record]]:
    """All parts at the same time, each at its server; the records of those sent after the warm-up."""
    runs = [part.run(url, MODEL, WARM_S + seconds) for url, part in parts]
    await asyncio.gather(*(run.run() for run in runs))
    counted = [
        [one for one in run.records if one.sent_s is not None and one.sent_s >= run.began_s + WARM_S]
        for run in runs
    ]
    failed = [one for records in counted for one in records if one.failure is not None]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0].failure}")
    return counted


@dataclass(frozen=True)
class Tokens:
    """Times of the streams' tokens, in ms."""

    where: str
    tpot_median: float
    tpot_p99: float
    """Of requests: each one's mean over its tokens but the first."""
    gap_median: float
    gap_p99: float
    """Of tokens: each one's own."""
    tokens_per_s: float
    prompts: int
    """Long ones that came meanwhile."""
    ttft_median: float
    """Of those."""


def tokens(where: str, streams: list[Record], prompts: list[Record], seconds: float) -> Tokens:
    tpot = [one.tpot_s * 1e3 for one in streams if one.tpot_s is not None]
    if not tpot:
        raise SystemExit(f"{where}: no stream ended in time; give it more --seconds")
    gaps = np.concatenate([one.itl_s() for one in streams]) * 1e3
    ttft = [one.ttft_s * 1e3 for one in prompts if one.ttft_s is not None]
    return Tokens(
        where,
        tpot_median=float(np.percentile(tpot, 50)),
        tpot_p99=float(np.percentile(tpot, 99)),
        gap_median=float(np.percentile(gaps, 50)),
        gap_p99=float(np.percentile(gaps, 99)),
        tokens_per_s=len(gaps) / seconds,
        prompts=len(prompts),
        ttft_median=float(np.median(ttft)) if ttft else 0.0,
    )


def interference(asked: argparse.Namespace) -> list[Tokens]:
    streams = Part(SHORT, 128, streams=asked.streams, seed=1)
    prompts = Part(asked.long, 4, rate=asked.long_rate, seed=2)
    found: list[Tokens] = []

    def tell(where: str, parts: Sequence[tuple[str, Part]]) -> None:
        measured = asyncio.run(measure(parts, asked.seconds))
        found.append(tokens(where, measured[0], measured[1] if len(measured) > 1 else [], asked.seconds))
        print(f"{where}: {found[-1].gap_median:.1f} ms a token", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        near, far = (stack.enter_context(server(ONE, asked.chunk)) for _ in range(2))
        tell("alone", [(near.url, streams)])
        tell("floor", [(near.url, streams), (far.url, prompts)])
    for chunk in sorted({asked.chunk, asked.small_chunk}):
        with server(TOGETHER, chunk) as both:
            tell(f"together, chunks of {chunk}", [(both.url, streams), (both.url, prompts)])
    with server(APART, asked.chunk) as apart:
        tell("apart", [(apart.url, streams), (apart.url, prompts)])
    return found


def server(roles: Sequence[str], chunk: int) -> Server:
    return Server(MODEL, [*roles, "--threads", "1", "--max-num-batched-tokens", str(chunk)])


@dataclass(frozen=True)
class Good:
    """One rate of the sweep."""

    where: str
    rate: float
    goodput: float
    """Requests a second that keep both objectives."""
    share: float
    ttft_p90: float
    tpot_p90: float
    """ms"""


def sweep(asked: argparse.Namespace) -> list[Good]:
    objectives = Objectives(ttft=asked.ttft / 1e3, tpot=asked.tpot / 1e3)
    found: list[Good] = []
    for where, roles in (("together", TOGETHER), ("apart", APART)):
        with server(roles, asked.chunk) as cluster:
            for number, rate in enumerate(asked.rates):
                seed = 10 * number  # prompts of their own, or caches would have those of the rates before
                parts = [
                    Part(SHORT, ANSWER, rate=rate * (1 - asked.long_share), seed=seed + 3),
                    Part(asked.long, ANSWER, rate=rate * asked.long_share, seed=seed + 4),
                ]
                measured = asyncio.run(measure([(cluster.url, part) for part in parts], asked.seconds))
                records = [one for each in measured for one in each]
                met = sum(objectives.met_by(one) for one in records)
                p90 = [
                    float(np.percentile([1e3 * (one or 0.0) for one in values], 90))
                    for values in zip(*((one.ttft_s, one.tpot_s) for one in records), strict=True)
                ]
                found.append(Good(where, rate, met / asked.seconds, met / len(records), *p90))
                print(f"{where} at {rate:g}/s: {found[-1].goodput:.2f}", file=sys.stderr, flush=True)
    return found


def show(interfered: list[Tokens], swept: list[Good], asked: argparse.Namespace) -> None:
    console = Console(width=120)
    floor = next(one for one in interfered if one.where == "floor")
    table = Table(
        "",
        "TPOT median / p99, ms",
        "a token's gap median / p99, ms",
        "p99 / floor's",
        "tokens a second",
        "TTFT of long prompts, ms",
        title=f"{asked.streams} streams, prompts of {asked.long} tokens at {asked.long_rate:g}/s",
    )
    for one in interfered:
        table.add_row(
            one.where,
            f"{one.tpot_median:.1f} / {one.tpot_p99:.1f}",
            f"{one.gap_median:.1f} / {one.gap_p99:.1f}",
            f"{one.gap_p99 / floor.gap_p99:.2f}",
            f"{one.tokens_per_s:.0f}",
            f"{one.ttft_median:.0f}" if one.prompts else "",
        )
    console.print(table)
    table = Table(
        "offered, 1/s",
        "together",
        "apart",
        title=f"goodput within TTFT {asked.ttft:g} ms and TPOT {asked.tpot:g} ms; {asked.long_share:.0%} of "
        f"prompts have {asked.long} tokens",
    )
    by = {(one.where, one.rate): one for one in swept}
    words: list[str] = []
    for rate in asked.rates:
        pair = [by[where, rate] for where in ("together", "apart")]
        table.add_row(
            f"{rate:g}",
            *(
                f"{one.goodput:.2f} ({one.share:.0%}; p90 {one.ttft_p90:.0f} / {one.tpot_p90:.1f} ms)"
                for one in pair
            ),
        )
        together, apart = (one.goodput for one in pair)
        if apart > 1.05 * together:
            words.append(
                f"at {rate:g}/s disaggregation pays: {apart / max(together, 1e-9):.2f} times the goodput"
            )
        elif together > 1.05 * apart:
            words.append(
                f"at {rate:g}/s it does NOT pay: {together / max(apart, 1e-9):.2f} times as much together"
            )
        else:
            words.append(f"at {rate:g}/s it makes no difference")
    console.print(table)
    for line in words:
        console.print(line, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement (40)")
    parser.add_argument("--streams", type=int, default=8, help="that decode at a time (8)")
    parser.add_argument("--long", type=int, default=1536, help="tokens of a long prompt, ± 20%% (1536)")
    parser.add_argument("--long-rate", type=float, default=0.5, help="long prompts a second (0.5)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step, of all workers (512)")
    parser.add_argument("--small-chunk", type=int, default=64, help="and of one more run together (64)")
    parser.add_argument(
        "--rates",
        type=lambda text: [float(each) for each in text.split(",")],
        default=[1.0, 2.0, 3.0, 4.0, 6.0],
        help="of the sweep, requests a second, with commas (1,2,3,4,6)",
    )
    parser.add_argument("--long-share", type=float, default=0.25, help="of the sweep's prompts (0.25)")
    parser.add_argument("--ttft", type=float, default=2000.0, help="objective of the sweep, ms (2000)")
    parser.add_argument("--tpot", type=float, default=50.0, help="objective of the sweep, ms (50)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    asked = parser.parse_args()
    interfered, swept = interference(asked), sweep(asked)
    show(interfered, swept, asked)
    if asked.json is not None:
        figures = {"tokens": interfered, "goodput": swept}
        asked.json.write_text(msgspec.json.format(msgspec.json.encode(figures), indent=1).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
