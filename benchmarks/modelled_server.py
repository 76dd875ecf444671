"""What `headrace serve` runs, with workers that compute nothing: the whole of a gateway, and no model's time.

    python benchmarks/modelled_server.py DIRECTORY --workers 2

Gateway, supervisors and engines are the real ones, each a process of its own, with the model's own tokenizer
and chat template. Only the executor is modelled (`sim/modelled_executor.py`): a step takes as long as one of
an 8B model on an H100, and brings the vocabulary's tokens in turn.

With SIGUSR1 it prints how many seconds of CPU tokenising has taken so far, in whichever thread.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from headrace.api.http import bind
from headrace.api.service import Service
from headrace.api.workers import Pools
from headrace.config import EngineOptions
from headrace.engine import Engine, KVCache, Scheduler, SchedulerConfig
from headrace.protocol.messages import EngineInfo
from headrace.sim.cost import StepCost, device, model, rates_of
from headrace.sim.modelled_executor import ModelledExecutor
from headrace.store import open_model
from headrace.text import Tokenizer
from headrace.worker import serve
from headrace.world import real_world
from headrace.world.launcher import die_with_parent

STEPS_OF = model("llama-8b")
ON = device("h100")
CACHE_TOKENS = 500_000
MAX_MODEL_LEN = 8192
TOKENISED = "tokenised"


class Tokenising:
    """Seconds of CPU that have gone into `Tokenizer.encode`."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        encode = Tokenizer.encode

        @functools.wraps(encode)
        def timed(*args: Any, **kwargs: Any) -> list[int]:
            began_s = time.thread_time()
            try:
                return encode(*args, **kwargs)
            finally:
                self.cpu_s += time.thread_time() - began_s

        Tokenizer.encode = timed  # type: ignore[method-assign]


def gateway(directory: Path, workers: int) -> None:
    """Serve until a signal says otherwise; says on standard error where, as `headrace serve` does."""
    tokenising = Tokenising()
    signal.signal(signal.SIGUSR1, lambda *_: say(f"{TOKENISED} {tokenising.cpu_s:.6f}"))
    files = open_model(directory)
    service = Service(
        files,
        EngineOptions(directory=str(directory), served_name=files.name, max_num_batched_tokens=8192),
        bind("127.0.0.1", 0),
        say=say,
        pools=Pools(both=workers),
        engine_command=(sys.executable, str(Path(__file__).resolve()), "--engine"),
    )
    uvloop.run(service.run())


def engine(address: str, parent: str) -> None:
    """An engine process, as `headrace.worker.main` runs one."""
    die_with_parent(int(parent))
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineOptions)
    built, info = _build(options)
    asyncio.run(serve(real_world(), address, built, info))


def _build(options: EngineOptions) -> tuple[Engine, EngineInfo]:
    files = open_model(Path(options.directory))
    blocks = CACHE_TOKENS // options.block_size
    config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN,
        vocab_size=files.config["vocab_size"],
        eos_token_ids=frozenset(),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_waiting=options.max_waiting,
    )
    cache = KVCache(num_blocks=blocks, block_size=options.block_size, key=options.cache_key)
    executor = ModelledExecutor(StepCost(STEPS_OF, rates_of(ON)), config.vocab_size, blocks)
    info = EngineInfo(
        model=STEPS_OF.name,
        revision=files.revision,
        numerics="modelled",
        dtype="modelled",
        batch_invariant=True,
        max_model_len=config.max_model_len,
        vocab_size=config.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        block_size=options.block_size,
        num_blocks=blocks,
        block_bytes=1,
        weight_bytes=0,
        prefix_caching=True,
        block_names=cache.block_names,
        kv_layout="modelled",
        threads=1,
        pid=1,
    )
    return Engine(Scheduler(config, cache), executor), info


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        engine(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    gateway(asked.directory, asked.workers)


if __name__ == "__main__":
    main()
