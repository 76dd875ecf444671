"""`headrace gateway`: the server without workers of its own; `headrace worker` joins it."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.config_options import ConfigFlags, Configured
from headrace.cli.errors import clear_errors
from headrace.cli.groups import spread
from headrace.cli.http_options import CredentialsDirectory, HttpFlags, SplitFlags, say
from headrace.cli.serving import Source, beside, serve_http
from headrace.config import EngineOptions

DEFAULT_LISTEN = "127.0.0.1:7000"


@spread
def gateway(
    context: typer.Context,
    http: HttpFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Each a name, a directory, a GGUF file, or a hub id.",
            show_default="what the file says",
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where workers join, over mutual TLS.")
    ] = DEFAULT_LISTEN,
    credentials: CredentialsDirectory = None,
    *,
    split: SplitFlags,
    configured: ConfigFlags,
) -> None:
    """Serve each MODEL over HTTP with the workers that join. Their weights are not read here."""
    with clear_errors():
        from headrace.api.workers import Pools

        said = Configured.of(context)
        for section in ("pools", "engine", "transfer", "autoscale"):
            if said.file.says(section):
                say(f"{said.path or '--set'}: {section} is of workers, and left to those that join")
        given = models or ([said.file.model] if said.file.model is not None else [])
        if http.served_model_name is not None and len(given) != 1:
            raise ValueError(
                f"--served-model-name {http.served_model_name} names one model, and {len(given)} are given; "
                "give each a name in the file, as in models: {NAME: {model: MODEL}}"
            )
        named = [Source(model, http.served_model_name, said.naming(model)) for model in given]
        first, others = (named[0], named[1:]) if named else (None, [])
        others += beside(said)
        if first is None and not others:
            raise ValueError("no model is given; name one or more, or some in the file of --config")
        serve_http(
            first,
            others,
            lambda files, name: EngineOptions(directory=str(files.directory), served_name=name),
            Pools(elsewhere=True),
            http=http,
            gateway=said.gateway(split.policy()),
            names=said.file.models,
            listen=listen,
            credentials=credentials,
        )
