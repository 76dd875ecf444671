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
from headrace.cli.http_options import CredentialsDirectory, ServedModelName, cluster_credentials, say
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
from headrace.config import EngineOptions, parse_size
from headrace.protocol.messages import Role
from headrace.world.network import split_host_port

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    dtype: DtypeOption = DEFAULTS.dtype,
    quantization: QuantizationOption = DEFAULTS.quantization,
    threads: Threads = DEFAULTS.threads,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens,
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY,
    block_size: BlockSize = DEFAULTS.block_size,
    no_prefix_caching: NoPrefixCaching = False,
    served_model_name: ServedModelName = None,
    batch_invariant: BatchInvariant = False,
) -> None:
    """Run a worker for MODEL and join a cluster. SIGTERM drains it, Ctrl-C stops it."""
    with clear_errors():
        from headrace.cli.models import PullProgress
        from headrace.store import resolve
        from headrace.worker import WorkerOptions
        from headrace.worker.process import ProcessOptions, run_worker
        from headrace.world import real_world
        from headrace.world.private_directory import PrivateDirectory

        gateways = tuple(address.strip() for address in join.split(",") if address.strip())
        _check_addresses(gateways, data_address)
        shared = cluster_credentials(credentials, make=False)
        with PullProgress() as progress:
            files = resolve(model, progress)
        engine = EngineOptions(
            directory=str(files.directory),
            served_name=served_model_name or files.name,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=parse_size(kv_cache_memory),
            block_size=block_size,
            prefix_caching=not no_prefix_caching,
            batch_invariant=batch_invariant,
            shared_kv=True,
            cache_key=shared.cluster_key,
        )
        options = ProcessOptions(
            worker=WorkerOptions(
                worker_id=name or f"{role}-{socket.gethostname()}-{os.getpid()}",
                join=gateways,
                role=role,
                data_address=data_address,
            ),
            engine=msgspec.Raw(msgspec.json.encode(engine)),
        )
        directory = PrivateDirectory("headrace-worker-")
        try:
            say(f"{options.worker.worker_id}: joining {', '.join(gateways)}")
            address = f"unix:{directory.path}/engine.sock"
            asyncio.run(run_worker(real_world(shared), options, address, say))
        finally:
            directory.remove()


def _check_addresses(gateways: tuple[str, ...], data_address: str) -> None:
    """Raise ValueError for what is no address, or where no other worker could reach this one."""
    if not gateways:
        raise ValueError("--join names no gateway; give HOST:PORT")
    elsewhere = [address for address in gateways if split_host_port(address)[0] not in LOOPBACK]
    host, _ = split_host_port(data_address)
    if elsewhere and host in LOOPBACK:
        raise ValueError(
            f"--data-address is {data_address}, where workers of other machines could not fetch KV blocks, "
            f"and the gateway at {elsewhere[0]} is of another; give this machine's own address"
        )
    if host in ("0.0.0.0", "::"):
        raise ValueError(f"--data-address is told to other workers, and {host} is no address to dial")
