"""`headrace serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli import STARTED_S
from headrace.cli.errors import clear_errors
from headrace.cli.http_options import (
    DEFAULT_DRAIN_TIMEOUT_S,
    DEFAULT_MAX_BODY_SIZE,
    DEFAULT_QUEUE_MAX,
    DEFAULT_THRESHOLD,
    ApiKeyOption,
    ApiKeys,
    ConfigFile,
    CorsOrigin,
    CredentialsDirectory,
    DrainTimeout,
    Host,
    MaxBodySize,
    MaxPromptCharacters,
    Port,
    PrefillQueueMax,
    PromptLengthThreshold,
    RequestTimeout,
    ServedModelName,
    cluster_credentials,
    say,
    serving_options,
)
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
from headrace.config import EngineOptions, parse_size
from headrace.config.serving import DEFAULT_MAX_PROMPT_CHARACTERS


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKeyOption = None,
    api_keys: ApiKeys = None,
    cors_origin: CorsOrigin = None,
    max_body_size: MaxBodySize = DEFAULT_MAX_BODY_SIZE,
    max_prompt_characters: MaxPromptCharacters = DEFAULT_MAX_PROMPT_CHARACTERS,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait; more get 429.")
    ] = DEFAULTS.max_waiting,
    request_timeout: RequestTimeout = None,
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
    prompt_length_threshold: PromptLengthThreshold = DEFAULT_THRESHOLD,
    prefill_queue_max: PrefillQueueMax = DEFAULT_QUEUE_MAX,
    config: ConfigFile = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Let workers of elsewhere join here.", show_default=False),
    ] = None,
    credentials: CredentialsDirectory = None,
    served_model_name: ServedModelName = None,
    batch_invariant: BatchInvariant = False,
    drain_timeout: DrainTimeout = DEFAULT_DRAIN_TIMEOUT_S,
) -> None:
    """Serve MODEL over HTTP. SIGTERM drains, Ctrl-C stops; a second signal stops at once."""
    with clear_errors():
        from headrace.api.http import bind
        from headrace.cli.models import PullProgress
        from headrace.store import resolve

        serving = serving_options(
            api_key, api_keys, cors_origin, max_body_size, max_prompt_characters, request_timeout
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
        from headrace.api.workers import Door, Pools

        pools = Pools(prefill, decode, both)
        gateway = GatewayOptions(
            split=SplitPolicy(
                prompt_length_threshold=prompt_length_threshold, prefill_queue_max=prefill_queue_max
            )
        )
        door = Door(listen, cluster_credentials(credentials, make=True)) if listen is not None else None
        service = Service(
            files,
            options,
            bound,
            serving=serving,
            drain_timeout_s=drain_timeout,
            pools=pools,
            door=door,
            gateway=gateway,
            started_s=STARTED_S,
            say=say,
        )
        uvloop.run(service.run())
