"""Headrace against what a user could pick instead on the same machine: same model, threads and prompts.

    python benchmarks/compare_engines.py [--engines headrace-bf16 vllm ...] [--repeat 5] [--json FILE]

Installs vLLM (CPU), llama.cpp and OpenVINO GenAI into environments of their own under build/peers (the first
time takes ten minutes), starts each engine once, and measures them in turn, one case at a time, with the
other engines' processes stopped. Prompts are random tokens, never the same twice. Medians over the repeats;
ratios are of medians taken in one run. Memory's read bandwidth is measured in every round too.

Exits with 1 when a ratio is under its bar.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compare.environments import Environment, vllm_preload
from compare.session import DriverError, DriverOptions, Session
from headrace import _native
from headrace.config.engine import usable_cores
from headrace.store import ModelFiles, resolve
from machine import read_bandwidth

PEERS = Path(__file__).parents[1] / "build" / "peers"
MAX_MODEL_LEN, MAX_NUM_SEQS = 4608, 32
DECODE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine and the precision it runs in. `peer` names its environment; None is this one."""

    driver: str
    precision: str
    peer: str | None


CANDIDATES = {
    "headrace-bf16": Candidate("headrace_engine.py", "bf16", None),
    "headrace-int8": Candidate("headrace_engine.py", "int8", None),
    "vllm": Candidate("vllm_engine.py", "bf16", "vllm"),
    "llama.cpp": Candidate("llama_cpp_engine.py", "4-bit", "llama.cpp"),
    "openvino": Candidate("openvino_engine.py", "4-bit", "openvino"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `prompts` × `prompt_tokens` in, `output_tokens` each out.

    A decode case counts what the tokens after the first take: a run of one token is measured beside it and
    taken off. A prefill case counts prompt tokens, all others output tokens.
    """

    name: str
    prompts: int
    prompt_tokens: int
    output_tokens: int

    @property
    def counts_prompt(self) -> bool:
        return self.output_tokens == 1

    @property
    def is_decode(self) -> bool:
        return self.prompts == 1 and not self.counts_prompt


CASES = (
    Case("decode, bs 1", 1, 64, 1 + DECODE_TOKENS),
    Case("bs 8, 64 in 64 out", 8, 64, 64),
    Case("bs 32, 64 in 64 out", 32, 64, 64),
    Case("prefill of 512", 1, 512, 1),
    Case("prefill of 4096", 1, 4096, 1),
)
SERVING = ("headrace-bf16", "headrace-int8", "vllm")
"""Engines that run several sequences at once here. Only these are asked for batches and for
the long prompt, which takes llama.cpp most of a minute."""

BARS = (
    ("headrace-bf16", ("vllm",), "decode, bs 1", 1.8),
    ("headrace-int8", ("llama.cpp", "openvino"), "decode, bs 1", 1.5),
    ("headrace-bf16", ("vllm",), "bs 8, 64 in 64 out", 1.4),
    ("headrace-bf16", ("vllm",), "bs 32, 64 in 64 out", 1.3),
    ("headrace-bf16", ("vllm",), "prefill of 512", 1.1),
    ("headrace-bf16", ("vllm",), "prefill of 4096", 1.1),
)
"""Who is to be how much faster than the fastest of whom, in what."""
BANDWIDTH_BAR = 0.65
"""The share of memory's read bandwidth at which bs 1 decode is to read weights."""


@dataclass
class Results:
    """Tokens per second by engine and case, one per repeat; and what was measured beside them."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)
    read_bytes_per_s: list[float] = field(default_factory=list)
    weight_bytes: int = 0

    def median(self, engine: str, case: str) -> float | None:
        rates = self.rates.get(engine, {}).get(case)
        return statistics.median(rates) if rates else None


def measure(session: Session, case: Case, vocab_size: int, rng: random.Random) -> float:
    """Tokens per second of one run."""

    def run(output_tokens: int) -> float:
        prompts = [
            [rng.randrange(vocab_size) for _ in range(case.prompt_tokens)] for _ in range(case.prompts)
        ]
        return session.generate(prompts, output_tokens)

    if case.is_decode:
        first = run(1)
        return (case.output_tokens - 1) / (run(case.output_tokens) - first)
    tokens = case.prompt_tokens if case.counts_prompt else case.output_tokens
    return case.prompts * tokens / run(case.output_tokens)


def weight_bytes(files: ModelFiles) -> int:
    """What one decoded token reads at 16 bits: every weight once, of two embeddings only the head's."""
    apart = any(name.startswith("lm_head.") for name in files.tensors)
    read = [
        math.prod(entry.shape)
        for name, entry in files.tensors.items()
        if not (apart and "embed_tokens" in name)
    ]
    return 2 * sum(read)


def start(name: str, options: argparse.Namespace, files: ModelFiles) -> Session:
    """The driver's process, not yet loaded."""
    candidate = CANDIDATES[name]
    python, environment = Path(sys.executable), {}
    if candidate.peer is not None:
        own = Environment(PEERS, candidate.peer)
        python, environment = own.python, vllm_preload(own) if candidate.peer == "vllm" else {}
    return Session(
        python,
        candidate.driver,
        DriverOptions(
            directory=files.directory,
            gguf=files.directory / "original.gguf",
            threads=options.threads,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            precision=candidate.precision,
        ),
        environment,
    )


def compare(options: argparse.Namespace, files: ModelFiles, say: Console) -> Results:
    """Start every engine, then measure all of them in turn, case by case, `options.repeat` times."""
    rng = random.Random(options.seed)
    vocab_size = int(files.config["vocab_size"])
    results = Results(weight_bytes=weight_bytes(files))
    _native.set_threads(options.threads)
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in options.engines:
            say.print(f"starting {name} ...", highlight=False)
            began = time.perf_counter()
            session = stack.enter_context(start(name, options, files))
            session.generate([rng.choices(range(vocab_size), k=64)], 1)
            results.first_token_s[name] = time.perf_counter() - began
            sessions[name] = session
        for round_ in range(-1, options.repeat):  # the first only warms up
            results.read_bytes_per_s.append(read_bandwidth(5))
            for case in CASES:
                for name in options.engines:
                    if name not in SERVING and (case.prompts > 1 or case.prompt_tokens > 512):
                        continue
                    rate = measure(sessions[name], case, vocab_size, rng)
                    if round_ >= 0:
                        results.rates.setdefault(name, {}).setdefault(case.name, []).append(rate)
            say.print(f"round {round_ + 1} of {options.repeat} done", highlight=False)
    return results


def show(results: Results, options: argparse.Namespace, console: Console) -> bool:
    """Print the tables; whether every ratio that could be taken reached its bar."""
    table = Table(
        title=f"{options.model}, {options.threads} threads: tokens per second, medians of {options.repeat}"
    )
    table.add_column("")
    for name in options.engines:
        table.add_column(name, justify="right")
    for case in CASES:
        medians = [results.median(name, case.name) for name in options.engines]
        table.add_row(case.name, *("" if rate is None else f"{rate:,.0f}" for rate in medians))
    table.add_row(
        "start to first token", *(f"{results.first_token_s[name]:.1f} s" for name in options.engines)
    )
    console.print(table)

    bars = Table(title="ratios of this run")
    for column in ("", "against", "ratio", "at least", ""):
        bars.add_column(column)
    held = True

    def row(what: str, against: str, ratio: float, bar: float) -> None:
        nonlocal held
        held &= ratio >= bar
        bars.add_row(what, against, f"{ratio:.2f}", f"{bar}", "reached" if ratio >= bar else "not reached")

    for engine, peers, case, bar in BARS:
        ours = results.median(engine, case)
        theirs = {peer: rate for peer in peers if (rate := results.median(peer, case)) is not None}
        if ours is None or not theirs:
            continue
        fastest = max(theirs, key=lambda peer: theirs[peer])
        row(f"{engine}, {case}", fastest, ours / theirs[fastest], bar)
    decoded = results.median("headrace-bf16", CASES[0].name)
    if decoded is not None:
        bandwidth = statistics.median(results.read_bytes_per_s)
        share = decoded * results.weight_bytes / bandwidth
        row("headrace-bf16, weights read", f"memory at {bandwidth / 1e9:.1f} GB/s", share, BANDWIDTH_BAR)
    console.print(bars)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a built-in model, which has its GGUF file")
    parser.add_argument("--engines", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    options = parser.parse_args()
    console = Console()
    for peer in dict.fromkeys(CANDIDATES[name].peer for name in options.engines):
        if peer is not None and not Environment(PEERS, peer).installed:
            console.print(f"installing {peer} into {PEERS / peer} ...", highlight=False)
            Environment(PEERS, peer).install()
    files = resolve(options.model)
    try:
        results = compare(options, files, console)
    except DriverError as error:
        sys.exit(f"an engine failed: {error}")
    held = show(results, options, console)
    if options.json:
        options.json.write_text(json.dumps({**asdict(results), "cores": os.cpu_count()}, indent=1))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
