"""`headrace serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
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
    QuantizationOption,
    Threads,
)
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.config import ApiKey, EngineOptions, ServingOptions, format_size, parse_size, read_keys
from headrace.config.serving import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_PROMPT_CHARACTERS

API_KEY_VARIABLE = "HEADRACE_API_KEY"
DEFAULT_MAX_BODY_SIZE = format_size(DEFAULT_MAX_BODY_BYTES).replace(" ", "")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            help="Ask clients for this key, or one of several; the variable keeps it from process lists.",
            show_default=False,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML file of keys with limits for each.", show_default=False),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let pages of this origin call; * is all.", show_default=False),
    ] = None,
    max_body_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest body of a request.")
    ] = DEFAULT_MAX_BODY_SIZE,
    max_prompt_characters: Annotated[
        int, typer.Option(min=1, help="Longest text of a request, before it is tokenised.")
    ] = DEFAULT_MAX_PROMPT_CHARACTERS,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait; more get 429.")
    ] = DEFAULTS.max_waiting,
    request_timeout: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds that a request may take.", show_default="no limit"),
    ] = None,
    dtype: DtypeOption = DEFAULTS.dtype,
    quantization: QuantizationOption = DEFAULTS.quantization,
    threads: Threads = DEFAULTS.threads,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens,
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY,
    block_size: BlockSize = DEFAULTS.block_size,
    no_prefix_caching: NoPrefixCaching = False,
    prefill: Annotated[int, typer.Option(min=0, help="Workers that prefill long prompts for others.")] = 0,
    decode: Annotated[
        int, typer.Option(min=0, help="Workers that decode; short prompts they prefill too.")
    ] = 0,
    both: Annotated[
        int,
        typer.Option(min=0, help="Workers that do everything.", show_default="1, where there are no others"),
    ] = 0,
    prompt_length_threshold: Annotated[
        int,
        typer.Option(min=0, help="A prefill worker takes prompts with more uncached tokens than this."),
    ] = SplitPolicy().prompt_length_threshold,
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

        keys = [ApiKey.of(key, _key_name(number)) for number, key in enumerate(api_key or (), 1)]
        serving = ServingOptions(
            keys=(*keys, *(read_keys(api_keys) if api_keys is not None else ())),
            cors_origins=tuple(cors_origin or ()),
            max_body_bytes=parse_size(max_body_size),
            max_prompt_characters=max_prompt_characters,
            request_timeout_s=request_timeout,
        )
        bound = bind(host, port)
        with PullProgress() as progress:
            files = resolve(model, progress)
        options = EngineOptions(
            directory=str(files.directory),
            served_name=served_model_name or files.name,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            kv_cache_memory=parse_size(kv_cache_memory),
            block_size=block_size,
            prefix_caching=not no_prefix_caching,
            batch_invariant=batch_invariant,
        )
        import uvloop

        from headrace.api.service import Service
        from headrace.api.workers import Pools

        pools = Pools(prefill, decode, both)
        gateway = GatewayOptions(split=SplitPolicy(prompt_length_threshold=prompt_length_threshold))

        service = Service(
            files,
            options,
            bound,
            serving=serving,
            drain_timeout_s=drain_timeout,
            pools=pools,
            gateway=gateway,
            started_s=STARTED_S,
            say=_say,
        )
        uvloop.run(service.run())


def _key_name(number: int) -> str:
    """What a key without a name of its own is called in errors."""
    return "default" if number == 1 else f"default {number}"


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever read our words has left; serving goes on
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
