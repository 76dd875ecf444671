"""Microseconds that routing takes of the gateway's core, and decisions per second, on one core.

A decision names the blocks of a prompt of 2,000 tokens (125 blocks of 16) by keyed hashes, asks the KV index
how many of them each worker holds, scores every worker with the default policy, predicts its TTFT and TPOT,
and keeps all of it to be explained. Placing a request is that and its books: credit, ledger, journey and the
message that would be sent. With workers that only prefill, a prompt that is long enough has two decisions;
with early rejection, what it would find is foreseen first. All of it is the gateway's own `Dispatch`.

Prompts share one of 64 system prompts of 512 tokens; each is held by one to four workers to different depths:
a million blocks in all, about twice as many with the workers that hold them. They are asked about in random
order, so most of what a look-up touches is in no cache near the core. The list of tokens is new each time, as
that of a prompt just tokenised is.

Microseconds are medians. Decisions a second are those of a core that does nothing else: the CPU time of all,
whatever else ran meanwhile.

The expectation is 5,000 decisions a second with 64 workers and 1,000 with 512.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from headrace.cluster.dispatch import Dispatch, Placed
from headrace.cluster.journey import Journeys
from headrace.cluster.ledger import Accepted, Ledger
from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import Member, Registry
from headrace.cluster.stream import OutputStream
from headrace.engine.identity import BlockHasher
from headrace.engine.intake import shared_salt
from headrace.protocol.channel import Channel
from headrace.protocol.messages import (
    BlockNames,
    EngineInfo,
    FromGateway,
    FromWorker,
    KVSnapshot,
    Role,
    StepStats,
    WorkerInfo,
)
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams
from headrace.world import real_world

BLOCK_SIZE = 16
PROMPT = 2000
SYSTEM_PROMPT = 512
VOCABULARY = 128_000
BLOCKS = 1_000_000
MODEL = "benchmark"
Tokens = NDArray[np.uint32]
WANTED = {64: 5000.0, 512: 1000.0}
"""Decisions a second by workers."""
DECISIONS = 3000
"""That are measured for each line."""


class Desk:
    """Where a gateway's messages would go."""

    def post(self, member: Member, message: FromGateway) -> None: ...

    def has_room(self, member: Member) -> None: ...

    def cancel(self, request_id: str, index: int | None, counts_as: FinishReason) -> None: ...


class Cluster:
    """What a gateway knows of its workers, and prompts of which they hold much, some or only the system
    prompt."""

    def __init__(self, workers: int, *, split: bool) -> None:
        """With `split`, every other worker prefills only."""
        rng = random.Random(workers)
        key = rng.randbytes(32)
        self.hasher = BlockHasher(key, b"benchmark", BLOCK_SIZE)
        self.root = self.hasher.root(shared_salt(self._request("", [])))
        self.desk, self.ledger, self.journeys = Desk(), Ledger(), Journeys()
        options = GatewayOptions(cache_key=key)
        registry = Registry(options)
        self.dispatch = Dispatch(real_world(), options, registry, self.ledger, self.desk, print)
        for number in range(workers):
            role = (Role.PREFILL, Role.DECODE)[number % 2] if split else Role.BOTH
            registry.register(
                _worker(f"worker-{number}", role, self.hasher), cast(Channel[FromWorker], None), 0.0
            )
        members = list(registry.live(MODEL))
        held: list[dict[bytes, None]] = [{} for _ in members]
        system_prompts = [_tokens(rng, SYSTEM_PROMPT) for _ in range(64)]
        prompts: list[Tokens] = []
        indexed: set[bytes] = set()
        while len(indexed) < BLOCKS:
            for _ in range(64):
                prompt = np.concatenate((rng.choice(system_prompts), _tokens(rng, PROMPT - SYSTEM_PROMPT)))
                chain = self.hasher.chain(self.root, prompt.tolist())
                for worker in rng.sample(range(workers), rng.choice((1, 1, 1, 2, 4))):
                    depth = rng.randint(SYSTEM_PROMPT // BLOCK_SIZE, len(chain))
                    held[worker].update(dict.fromkeys(chain[:depth]))
                    indexed.update(chain[:depth])
                prompts.append(prompt)
        self.blocks, self.pairs = len(indexed), sum(map(len, held))
        for member, blocks in zip(members, held, strict=True):
            _has_worked(member, rng)
            self.dispatch.joined(member)
            self.dispatch.heard_cache(member, KVSnapshot(1, list(blocks)))
        self.asked = [rng.choice(prompts) for _ in range(DECISIONS)]

    def _request(self, name: str, tokens: list[int]) -> GenerateRequest:
        return GenerateRequest(
            request_id=name, prompt=tokens, sampling=SamplingParams(max_tokens=128), model=MODEL
        )

    def name(self, tokens: list[int]) -> None:
        """The part of a decision that is hashing."""
        self.hasher.chain(self.root, tokens[: (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE])

    def place(self, tokens: list[int], *, foreseen: bool = False) -> None:
        """One request."""
        request = self._request("request", tokens)
        if foreseen:
            self.dispatch.foresee(request)
        stream = OutputStream([("request", 0)], self.desk.cancel)
        journey = self.journeys.begin("request", len(tokens), 0.0)
        self.accepted = self.ledger.enter(request, stream, journey, 0.0)
        if self.dispatch.place(self.accepted) is not Placed.YES:
            raise SystemExit("a request found no worker")

    def place_foreseen(self, tokens: list[int]) -> None:
        self.place(tokens, foreseen=True)

    def take_back(self) -> int:
        """As if it had ended; returns how many decisions it took."""
        accepted: Accepted = self.accepted
        home = accepted.home
        if home is None:
            raise SystemExit("a request that was placed has no home")
        home.drop_plan()
        home.member.has_seen(home.name)
        home.member.open_samples -= 1
        self.ledger.close_leg(home)
        self.ledger.strike_off(accepted)
        self.journeys.end(accepted.journey)
        return len(accepted.journey.decisions)


def _worker(name: str, role: Role, hasher: BlockHasher) -> WorkerInfo:
    engine = EngineInfo(
        model=MODEL,
        revision="0",
        numerics="none",
        dtype="bfloat16",
        batch_invariant=True,
        max_model_len=8192,
        vocab_size=VOCABULARY,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_waiting=1024,
        block_size=BLOCK_SIZE,
        num_blocks=65_536,
        block_bytes=1,
        weight_bytes=1,
        prefix_caching=True,
        block_names=BlockNames(hasher.fingerprint, 0, hasher.key_check),
        kv_layout="none",
        threads=1,
        pid=0,
    )
    address = "" if role is Role.BOTH else "127.0.0.1:1"
    return WorkerInfo(worker_id=name, generation=1, role=role, data_address=address, engine=engine)


def _has_worked(member: Member, rng: random.Random) -> None:
    """Let a worker have run steps; it has a queue shorter than two steps."""
    for step in range(64):
        running, tokens = rng.randrange(1, 64), rng.randrange(1, 2048)
        stats = StepStats(
            step=step,
            tokens=tokens,
            sampled=running,
            rows=running,
            step_s=0.01 + 1e-5 * tokens,
            kernel_s=0.01,
            running=running,
            waiting=0,
            queued_tokens=rng.randrange(0, 4000),
            blocks_free=1000,
            blocks_cached=40_000,
            blocks_held=24_536,
            blocks_leased=0,
            blocks_quarantined=0,
            held_tokens=running * 1000,
            preemptions=0,
            prefix_queries=0,
            prefix_hits=0,
            evictions=0,
        )
        member.told(stats, 0.0)
    member.open_samples = rng.randrange(0, 64)


def _tokens(rng: random.Random, count: int) -> Tokens:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, VOCABULARY, count, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Measured:
    times_us: list[float]
    cpu_s: float
    decisions: int

    @property
    def per_second(self) -> float:
        return self.decisions / self.cpu_s


def measure(part: Callable[[list[int]], None], made: Cluster, *, placed: bool) -> Measured:
    """For each prompt, after a few that count for nothing."""
    times: list[float] = []
    cpu_s, decisions = 0.0, 0
    for number, prompt in enumerate((*made.asked[:100], *made.asked)):
        tokens = prompt.tolist()
        before, began = time.thread_time(), time.perf_counter()
        part(tokens)
        took_us, used_s = (time.perf_counter() - began) * 1e6, time.thread_time() - before
        made_here = made.take_back() if placed else 0
        if number >= 100:
            times.append(took_us)
            cpu_s += used_s
            decisions += made_here
    return Measured(times, cpu_s, decisions)


async def run() -> int:
    """On an event loop, whose clock is the gateway's."""
    console, missed = Console(width=120), False
    for workers, wanted in WANTED.items():
        alike, split = (Cluster(workers, split=one) for one in (False, True))
        table = Table("", "median µs", "99% µs", "decisions a second", "wanted", title=f"{workers} workers")
        for row, measured, limit in (
            ("naming a prompt's blocks", measure(alike.name, alike, placed=False), None),
            ("placing, all of role both", measure(alike.place, alike, placed=True), wanted),
            ("placing, every other prefills", measure(split.place, split, placed=True), wanted),
            ("foreseeing and placing, both", measure(alike.place_foreseen, alike, placed=True), None),
            ("foreseeing and placing, prefill", measure(split.place_foreseen, split, placed=True), None),
        ):
            times = sorted(measured.times_us)
            cells = (f"{statistics.median(times):.0f}", f"{times[int(len(times) * 0.99)]:.0f}")
            each = f"{measured.per_second:,.0f}" if measured.decisions else ""
            table.add_row(row, *cells, each, "" if limit is None else f"{limit:,.0f}")
            missed |= limit is not None and measured.per_second < limit
        console.print(table)
        console.print(f"{alike.blocks:,} blocks, {alike.pairs:,} pairs of a block and a worker that holds it")
    console.print("MISSED" if missed else "met")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
