"""Moves KV blocks between workers: the source's leases, the target's pulls, and what they say to each other.

    source  QUEUED ─▶ RUNNING ─▶ HELD ──confirm──▶ RELEASED
                 └────────┴───────┴─ dropped, lease expired ─▶ QUARANTINED ──transport quiet──▶ RELEASED
    target  connect ─▶ read blocks as they are computed ─▶ confirm ─▶ imported
                 └───────────────┴──────────────────────────────┴─ anything else: not imported

The target pulls, as bytes on a stream (`tcp`) or by reading the source's memory (`nixl`). It may use what it
has read only when the source has confirmed, after the last byte, that the lease held to the end. Which
requests these blocks belong to and what follows is `worker/`'s business.
"""

from headrace.transfer.connector import Connector
from headrace.transfer.pool import Pool
from headrace.transfer.source import Exports
from headrace.transfer.target import Fetched, Patience, TransferFailed, fetch

__all__ = ["Connector", "Exports", "Fetched", "Patience", "Pool", "TransferFailed", "fetch"]
