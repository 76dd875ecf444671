"""`headrace serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.config_options import ConfigFlags, Configured
from headrace.cli.errors import clear_errors
from headrace.cli.groups import spread
from headrace.cli.http_options import CredentialsDirectory, HttpFlags, SplitFlags
from headrace.cli.options import Model
from headrace.cli.serving import Source, beside, serve_http
from headrace.cli.worker_options import (
    DEFAULT_DATA_ADDRESS,
    DataAddress,
    WorkerFlags,
    check_data_address,
    is_loopback,
)


@spread
def serve(
    context: typer.Context,
    model: Model,
    http: HttpFlags,
    *,
    workers: WorkerFlags,
    prefill: Annotated[int, typer.Option(min=0, help="Workers that prefill long prompts for others.")] = 0,
    decode: Annotated[
        int, typer.Option(min=0, help="Workers that decode; short prompts they prefill too.")
    ] = 0,
    both: Annotated[
        int,
        typer.Option(min=0, help="Workers that do everything.", show_default="1, where there are no others"),
    ] = 0,
    split: SplitFlags,
    configured: ConfigFlags,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Let workers of elsewhere join here.", show_default=False),
    ] = None,
    data_address: DataAddress = DEFAULT_DATA_ADDRESS,
    credentials: CredentialsDirectory = None,
) -> None:
    """Serve MODEL over HTTP. SIGTERM drains, Ctrl-C stops; a second signal stops at once."""
    with clear_errors():
        from headrace.api.workers import Pools

        outside = listen is not None and not is_loopback(listen)
        check_data_address(data_address, f"with --listen {listen} they may join" if outside else "")
        pools = Pools(
            prefill,
            decode,
            both,
            data_address=data_address,
            step_timeout_s=workers.step_timeout,
            connector=workers.connector,
            check_reads=workers.check_reads,
        )
        if len(pools.roles()) > 1 and not data_address.endswith(":0"):
            raise ValueError(
                f"--data-address {data_address} has one port for {len(pools.roles())} workers; give port 0"
            )
        said = Configured.of(context)
        if decode and not (prefill or both or listen or said.file.pools.prefill):
            raise ValueError(
                f"{decode} workers that decode would have to prefill everything themselves; add --prefill, "
                "or ask for them with --both"
            )
        serve_http(
            Source(model, http.served_model_name, said.naming(model)),
            beside(said),
            workers.engine,
            pools,
            http=http,
            gateway=said.gateway(split.policy()),
            names=said.file.models,
            listen=listen,
            credentials=credentials,
        )
