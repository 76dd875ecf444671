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
from headrace.cli.worker_options import WorkerFlags
from headrace.protocol.messages import Role
from headrace.world.network import split_host_port

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    data_address: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where it serves KV blocks to other workers; port 0 is any."),
    ] = "127.0.0.1:0",
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
        _check_addresses(gateways, data_address)
        # Who makes them where others have theirs only makes a cluster of its own, which nobody lets in.
        at_home = credentials is None and not _elsewhere(gateways)
        shared = cluster_credentials(credentials, make=at_home)
        files = find_model(model)
        engine = flags.engine(files, served_model_name, shared_kv=True, cache_key=shared.cluster_key)
        options = ProcessOptions(
            worker=WorkerOptions(
                worker_id=name or f"{role}-{socket.gethostname()}-{os.getpid()}",
                join=gateways,
                role=role,
                data_address=data_address,
                step_timeout_s=flags.step_timeout,
            ),
            engine=msgspec.Raw(msgspec.json.encode(engine)),
        )
        say(f"{options.worker.worker_id}: joining {', '.join(gateways)}")
        asyncio.run(run_worker(real_world(shared), options, say))
        say("stopped")


def _check_addresses(gateways: tuple[str, ...], data_address: str) -> None:
    """Raise ValueError for what is no address, or where no other worker could reach this one."""
    if not gateways:
        raise ValueError("--join names no gateway; give HOST:PORT")
    if len(set(gateways)) < len(gateways):
        raise ValueError(f"--join names a gateway twice: {', '.join(gateways)}")
    elsewhere = _elsewhere(gateways)
    host, _ = split_host_port(data_address)
    if elsewhere and host in LOOPBACK:
        raise ValueError(
            f"--data-address is {data_address}, where workers of other machines could not fetch KV blocks, "
            f"and the gateway at {elsewhere[0]} is of another; give this machine's own address"
        )
    if host in ("0.0.0.0", "::"):
        raise ValueError(f"--data-address is told to other workers, and {host} is no address to dial")


def _elsewhere(gateways: tuple[str, ...]) -> list[str]:
    """Those that are not on this machine."""
    return [address for address in gateways if split_host_port(address)[0] not in LOOPBACK]
