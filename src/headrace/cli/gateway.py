"""`headrace gateway`: the server without workers of its own; `headrace worker` joins it."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.config_options import ConfigFlags, Configured
from headrace.cli.errors import clear_errors
from headrace.cli.groups import spread
from headrace.cli.http_options import CredentialsDirectory, HttpFlags, SplitFlags, say
from headrace.cli.options import Model
from headrace.cli.serving import serve_http
from headrace.config import EngineOptions

DEFAULT_LISTEN = "127.0.0.1:7000"


@spread
def gateway(
    context: typer.Context,
    model: Model,
    http: HttpFlags,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where workers join, over mutual TLS.")
    ] = DEFAULT_LISTEN,
    credentials: CredentialsDirectory = None,
    *,
    split: SplitFlags,
    configured: ConfigFlags,
) -> None:
    """Serve MODEL over HTTP with the workers that join. It reads the model's text, not its weights."""
    with clear_errors():
        from headrace.api.workers import Pools

        said = Configured.of(context)
        for section in ("pools", "engine", "transfer", "autoscale"):
            if said.file.says(section):
                say(f"{said.path or '--set'}: {section} is of workers, and left to those that join")
        serve_http(
            model,
            lambda files: EngineOptions(
                directory=str(files.directory), served_name=http.served_model_name or files.name
            ),
            Pools(elsewhere=True),
            http=http,
            gateway=said.gateway(split.policy()),
            named_by=said.naming(model),
            listen=listen,
            credentials=credentials,
        )
