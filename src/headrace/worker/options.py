"""What a worker is asked to be, beside its engine. Times in seconds."""

from __future__ import annotations

import msgspec

from headrace.config.engine import DEFAULT_STEP_TIMEOUT_S, Connector
from headrace.protocol.messages import Role


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker. ValueError names the option and its limit."""

    worker_id: str
    join: tuple[str, ...] = ()
    """Addresses of the cluster's gateways."""
    role: Role = Role.BOTH
    data_address: str | None = None
    """Where it serves KV blocks to other workers; None where there are no others."""
    step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S
    """An engine that has not answered for so long is stuck, and is ended."""
    connector: Connector = "auto"
    """How KV blocks move between workers."""
    check_reads: bool = False
    """Whether blocks that came over NIXL are compared with checksums of the source's; over TCP all are."""
    lease_s: float = 30.0
    """How long computed blocks wait to be fetched."""

    def __post_init__(self) -> None:
        if not self.worker_id or not self.worker_id.isprintable() or len(self.worker_id) > 100:
            raise ValueError(f"worker_id must have 1 to 100 printable characters, got {self.worker_id!r}")
        if "/" in self.worker_id:
            raise ValueError(f"worker_id is part of paths and has no '/' in it, got {self.worker_id!r}")
        for name in ("step_timeout_s", "lease_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
