"""`headrace serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from headrace.cli import STARTED_S
from headrace.cli.errors import clear_errors
from headrace.cli.options import (
    DEFAULT_KV_CACHE_MEMORY,
    DEFAULTS,
    BatchInvariant,
    BlockSize,
    DtypeOption,
    KvCacheMemory,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    NoPrefixCaching,
    Threads,
)
from headrace.config import EngineOptions, parse_size

API_KEY_VARIABLE = "HEADRACE_API_KEY"


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, help="Ask clients for this key.", show_default=False),
    ] = None,
    dtype: DtypeOption = DEFAULTS.dtype,
    threads: Threads = DEFAULTS.threads,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens,
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY,
    block_size: BlockSize = DEFAULTS.block_size,
    no_prefix_caching: NoPrefixCaching = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for.", show_default="the model's own")
    ] = None,
    batch_invariant: BatchInvariant = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to end after SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve MODEL over HTTP. SIGTERM drains, Ctrl-C stops; a second signal stops at once."""
    with clear_errors():
        from headrace.api.http import bind
        from headrace.cli.models import PullProgress
        from headrace.store import resolve

        bound = bind(host, port)
        with PullProgress() as progress:
            files = resolve(model, progress)
        options = EngineOptions(
            directory=str(files.directory),
            served_name=served_model_name or files.name,
            dtype=dtype,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=parse_size(kv_cache_memory),
            block_size=block_size,
            prefix_caching=not no_prefix_caching,
            batch_invariant=batch_invariant,
        )
        import uvloop

        from headrace.api.service import Service

        service = Service(
            files,
            options,
            bound,
            api_key=api_key or None,
            drain_timeout_s=drain_timeout,
            started_s=STARTED_S,
            say=_say,
        )
        uvloop.run(service.run())


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever read our words has left; serving goes on
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
