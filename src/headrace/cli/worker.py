"""`headrace worker`: one engine with its supervisor, a member of a cluster that somebody else runs."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Annotated

import msgspec
import typer

from headrace.cli.errors import clear_errors
from headrace.cli.gateway import DEFAULT_LISTEN
from headrace.cli.groups import spread
from headrace.cli.http_options import CredentialsDirectory, ServedModelName, cluster_credentials, say
from headrace.cli.options import Model
from headrace.cli.serving import find_model
from headrace.cli.worker_options import (
    DEFAULT_DATA_ADDRESS,
    DataAddress,
    WorkerFlags,
    check_data_address,
    check_join_address,
    is_loopback,
)
from headrace.protocol.messages import Role


@spread
def worker(
    model: Model,
    join: Annotated[
        str, typer.Option(metavar="HOST:PORT,…", help="The cluster's gateways.")
    ] = DEFAULT_LISTEN,
    role: Annotated[Role, typer.Option(help="What it does in the cluster.")] = Role.BOTH,
    name: Annotated[
        str | None, typer.Option(help="Its name in the cluster.", show_default="role, host and process")
    ] = None,
    data_address: DataAddress = DEFAULT_DATA_ADDRESS,
    credentials: CredentialsDirectory = None,
    served_model_name: ServedModelName = None,
    *,
    flags: WorkerFlags,
) -> None:
    """Run a worker for MODEL and join a cluster. SIGTERM drains it, Ctrl-C stops it."""
    with clear_errors():
        from headrace.worker import WorkerOptions
        from headrace.worker.process import ProcessOptions, run_worker
        from headrace.world import real_world

        gateways = tuple(address.strip() for address in join.split(",") if address.strip())
        if not gateways:
            raise ValueError("--join names no gateway; give HOST:PORT")
        if len(set(gateways)) < len(gateways):
            raise ValueError(f"--join names a gateway twice: {', '.join(gateways)}")
        for address in gateways:
            check_join_address("--join", address)
        elsewhere = next((address for address in gateways if not is_loopback(address)), None)
        check_data_address(data_address, f"the gateway at {elsewhere} is of another" if elsewhere else "")
        # Who makes them where others have theirs only makes a cluster of its own, which nobody lets in.
        at_home = credentials is None and elsewhere is None
        shared = cluster_credentials(credentials, make=at_home)
        files = find_model(model)
        engine = flags.engine(files, served_model_name, shared_kv=True, cache_key=shared.cluster_key)
        options = ProcessOptions(
            worker=WorkerOptions(
                worker_id=f"{role}-{socket.gethostname()}-{os.getpid()}" if name is None else name,
                join=gateways,
                role=role,
                data_address=data_address,
                step_timeout_s=flags.step_timeout,
                connector=flags.connector,
                check_reads=flags.check_reads,
            ),
            engine=msgspec.Raw(msgspec.json.encode(engine)),
        )
        say(f"{options.worker.worker_id}: joining {', '.join(gateways)}")
        asyncio.run(run_worker(real_world(shared), options, say))
        say("stopped")
