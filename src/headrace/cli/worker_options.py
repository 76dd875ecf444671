"""What the workers of a command are like, as the command line spells it: engines, and when one is stuck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    NoPrefixCaching,
    QuantizationOption,
    Threads,
)
from headrace.config import EngineOptions, parse_size
from headrace.config.engine import DEFAULT_STEP_TIMEOUT_S, Connector
from headrace.world.network import UNIX_PREFIX, split_host_port

if TYPE_CHECKING:
    from headrace.store import ModelFiles

DEFAULT_DATA_ADDRESS = "127.0.0.1:0"
DataAddress = Annotated[
    str,
    typer.Option(
        "--data-address",
        metavar="HOST:PORT",
        help="Where KV blocks are served to other workers; port 0 is any.",
    ),
]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")


def is_loopback(address: str) -> bool:
    """Whether only this machine can dial HOST:PORT. Raises ValueError for what is no address."""
    return split_host_port(address)[0] in _LOOPBACK


def check_join_address(option: str, address: str) -> None:
    """Raise ValueError for where no worker can join."""
    if address.startswith(UNIX_PREFIX):
        raise ValueError(f"{option} {address}: workers join over TCP, and show certificates; give HOST:PORT")
    split_host_port(address)


def check_data_address(data_address: str, elsewhere: str) -> None:
    """Raise ValueError for what is no address, or where no other worker could fetch.

    `elsewhere` says why there may be workers of other machines; it is empty where there are none.
    """
    host, _ = split_host_port(data_address)
    if elsewhere and host in _LOOPBACK:
        raise ValueError(
            f"--data-address is {data_address}, where workers of other machines could not fetch KV blocks, "
            f"and {elsewhere}; give this machine's own address"
        )
    if host in _EVERYWHERE:
        raise ValueError(f"--data-address is told to other workers, and {host} is no address to dial")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFlags:
    """Of each worker that the command starts."""

    dtype: DtypeOption = DEFAULTS.dtype
    quantization: QuantizationOption = DEFAULTS.quantization
    threads: Threads = DEFAULTS.threads
    max_model_len: MaxModelLen = None
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY
    block_size: BlockSize = DEFAULTS.block_size
    max_waiting: Annotated[int, typer.Option(min=1, help="Sequences that may wait; more get 429.")] = (
        DEFAULTS.max_waiting
    )
    no_prefix_caching: NoPrefixCaching = False
    batch_invariant: BatchInvariant = False
    step_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds that a step may take; an engine that takes longer is taken for stuck."
        ),
    ] = DEFAULT_STEP_TIMEOUT_S
    connector: Annotated[
        Connector,
        typer.Option(
            help="How KV blocks move between workers: auto is NIXL on one machine where both have it, else "
            "TCP; nixl listens on the network too, to whoever reaches it."
        ),
    ] = "auto"
    check_reads: Annotated[
        bool, typer.Option("--check-reads", help="Compare checksums of blocks that came over NIXL.")
    ] = False

    def engine(self, files: ModelFiles, served_name: str | None, **more: Any) -> EngineOptions:
        """The engine's options, with `more` of them. Raises ValueError for what cannot be."""
        return EngineOptions(
            directory=str(files.directory),
            served_name=served_name or files.name,
            dtype=self.dtype,
            quantization=self.quantization,
            threads=self.threads,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_memory=parse_size(self.kv_cache_memory),
            max_waiting=self.max_waiting,
            block_size=self.block_size,
            prefix_caching=not self.no_prefix_caching,
            batch_invariant=self.batch_invariant,
            **more,
        )
