"""`headrace gateway`: the server without workers of its own; `headrace worker` joins it."""

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
from headrace.cli.options import Model
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.config import EngineOptions
from headrace.config.serving import DEFAULT_MAX_PROMPT_CHARACTERS

DEFAULT_LISTEN = "127.0.0.1:7000"


def gateway(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where workers join, over mutual TLS.")
    ] = DEFAULT_LISTEN,
    credentials: CredentialsDirectory = None,
    prompt_length_threshold: PromptLengthThreshold = DEFAULT_THRESHOLD,
    prefill_queue_max: PrefillQueueMax = DEFAULT_QUEUE_MAX,
    api_key: ApiKeyOption = None,
    api_keys: ApiKeys = None,
    cors_origin: CorsOrigin = None,
    max_body_size: MaxBodySize = DEFAULT_MAX_BODY_SIZE,
    max_prompt_characters: MaxPromptCharacters = DEFAULT_MAX_PROMPT_CHARACTERS,
    request_timeout: RequestTimeout = None,
    served_model_name: ServedModelName = None,
    drain_timeout: DrainTimeout = DEFAULT_DRAIN_TIMEOUT_S,
) -> None:
    """Serve MODEL over HTTP with the workers that join. It reads the model's text, not its weights."""
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
        import uvloop

        from headrace.api.service import Service
        from headrace.api.workers import Door, Pools

        service = Service(
            files,
            EngineOptions(directory=str(files.directory), served_name=served_model_name or files.name),
            bound,
            serving=serving,
            drain_timeout_s=drain_timeout,
            pools=Pools(elsewhere=True),
            door=Door(listen, cluster_credentials(credentials, make=True)),
            gateway=GatewayOptions(
                split=SplitPolicy(
                    prompt_length_threshold=prompt_length_threshold, prefill_queue_max=prefill_queue_max
                )
            ),
            started_s=STARTED_S,
            say=say,
        )
        uvloop.run(service.run())
