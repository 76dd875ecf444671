"""The workers that a local server starts: which ones, with what options, and how each process is launched.

In: what the command line asked for. Out: launchers by name, for a `LocalCluster`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from headrace.config import EngineOptions
from headrace.config.engine import DEFAULT_STEP_TIMEOUT_S, Connector
from headrace.protocol.messages import Role
from headrace.worker.options import WorkerOptions
from headrace.worker.process import ENGINE_COMMAND, ProcessOptions
from headrace.world.launcher import Launcher, LocalLauncher

if TYPE_CHECKING:
    from headrace.world.credentials import Credentials

WORKER_COMMAND = (sys.executable, "-m", "headrace.worker.process")
MAX_WORKERS = 256
"""Of one server, each of them two processes with weights and KV cache of its own."""
ALONE = "engine"
"""What the only worker of a server is called."""


@dataclass(frozen=True, slots=True)
class Pools:
    """How many workers of each role (without any, one does everything), and what holds for each of them."""

    prefill: int = 0
    decode: int = 0
    both: int = 0
    elsewhere: bool = False
    """All workers are started by others."""
    data_address: str = "127.0.0.1:0"
    """Where each of them serves KV blocks to others."""
    step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S
    """An engine that has not answered for so long is stuck, and is replaced."""
    connector: Connector = "auto"
    check_reads: bool = False
    """Whether blocks that came over NIXL are compared with checksums of the source's."""

    def __post_init__(self) -> None:
        if self.prefill and not (self.decode or self.both):
            raise ValueError("workers that only prefill need others that decode; add --decode")
        if (count := self.prefill + self.decode + self.both) > MAX_WORKERS:
            raise ValueError(
                f"{count} workers are asked for, and one server starts at most {MAX_WORKERS}; let more join "
                "with headrace worker"
            )

    def roles(self) -> dict[str, Role]:
        """Each worker's name and role."""
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.BOTH: self.both}
        roles = {f"{role}-{number}": role for role, count in counts.items() for number in range(1, count + 1)}
        return roles if roles or self.elsewhere else {ALONE: Role.BOTH}


@dataclass(frozen=True, slots=True)
class Door:
    """Where workers that others start may join, over mutual TLS."""

    address: str
    credentials: Credentials


def launchers(
    pools: Pools,
    options: EngineOptions,
    say: Callable[[str], None],
    *,
    cache_key: bytes,
    joinable: bool = False,
    engine_command: tuple[str, ...] = ENGINE_COMMAND,
) -> Mapping[str, Launcher]:
    """A launcher for each worker. Cores are shared out evenly; `say` gets what the processes print.

    Block identities are made with `cache_key`. With `joinable` workers that others start exchange blocks
    with them.
    """
    roles = pools.roles()
    options = msgspec.structs.replace(
        options,
        threads=max(1, options.threads // max(1, len(roles))),
        shared_kv=joinable or len(roles) > 1,
        cache_key=cache_key,
    )
    engine = msgspec.Raw(msgspec.json.encode(options))
    found: dict[str, Launcher] = {}
    for name, role in roles.items():
        process = ProcessOptions(
            worker=WorkerOptions(
                worker_id=name,
                role=role,
                data_address=pools.data_address if options.shared_kv else None,
                step_timeout_s=pools.step_timeout_s,
                connector=pools.connector,
                check_reads=pools.check_reads,
            ),
            engine=engine,
            engine_command=engine_command,
        )
        found[name] = LocalLauncher(WORKER_COMMAND, msgspec.json.encode(process), _prefixed(say, name))
    return found


def _prefixed(say: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda line: say(f"{name}: {line}")
