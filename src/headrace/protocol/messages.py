"""The messages between a gateway and a worker, one tagged union for each direction.

A worker dials in and says `Hello` (or `StartFailed`), and the gateway `Welcome` or `Rejected`. From then on
the gateway submits and cancels, and the worker answers each sequence with outputs, the last of which carries
its one ending. Request ids on this channel name attempts: a request that is tried again has a new one, so
what a former attempt still says concerns nobody.

A prompt that is prefilled by one worker (P) and decoded by another (D):

    gateway ──Submit(import)──▶ D    D has reserved blocks   D ──ImportReserved──▶ gateway
    gateway ──Submit(export)──▶ P    P knows the request     P ──ExportOffered(ticket)──▶ gateway
    gateway ──Fetch(ticket)──▶ D     D pulls from P, block by block as they are computed
    P ──Outputs(first token)──▶ gateway ──Begin(first token)──▶ D
    D ──ImportSettled──▶ gateway     and decodes; without the blocks it prefills first
"""

from __future__ import annotations

import enum

import msgspec

from headrace.protocol.handoff import Cause, Leg, Ticket
from headrace.protocol.requests import GenerateRequest, Progress, SequenceOutput

PROTOCOL_VERSION = 3


class Role(enum.StrEnum):
    """What a worker is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL

    @property
    def prefills_for_others(self) -> bool:
        return self is not Role.DECODE


class BlockNames(msgspec.Struct, frozen=True):
    """What the identity of a KV block is made from, beside its tokens and a key that only workers and
    gateways of one cluster have."""

    fingerprint: bytes
    """Weights, precision, layout."""
    group: int
    """The group of layers whose blocks are told of."""
    key_check: str
    """Equal ones are of equal keys and fingerprints."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves and how; fixed for its life. Lengths in tokens, sizes in bytes."""

    model: str
    revision: str
    """Hash of the weights and configuration."""
    numerics: str
    """Instruction set, torch, kernels and dtype: equal ones give equal bits."""
    dtype: str
    batch_invariant: bool
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    block_size: int
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    prefix_caching: bool
    block_names: BlockNames | None = None
    """How its KV blocks are named; None where nobody else could compute their names."""
    kv_layout: str
    """How bytes lie in a KV block: blocks of equal layout can be copied from one engine's pool to another."""
    threads: int
    pid: int
    notes: tuple[str, ...] = ()
    """What the engine decided at start-up and why, in words, one decision a line."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One committed step and the state after it, for metrics. Times in seconds."""

    step: int
    tokens: int
    sampled: int
    rows: int
    step_s: float
    kernel_s: float
    running: int
    waiting: int
    queued_tokens: int = 0
    """Prompt tokens of these that are still to be computed, without those that the prefix cache has."""
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_leased: int
    """Prefilled here, and waiting to be fetched by another worker."""
    blocks_quarantined: int
    """Given up, but perhaps still touched by a transfer."""
    held_tokens: int
    """Positions that held blocks really carry; against held * block_size it is the cache's efficiency."""
    preemptions: int
    """This and the following are totals since the engine's start."""
    prefix_queries: int
    prefix_hits: int
    evictions: int


class SequenceTimes(msgspec.Struct, frozen=True, array_like=True):
    """How long a sequence spent in each phase, in seconds of the engine's clock; None for one not reached.

    Preempted or not: prefill is from the first time it was scheduled to its first token, decode from there to
    its ending.
    """

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker with one life of its engine; when that ends, so does the connection."""

    worker_id: str
    """Its name in the cluster."""
    generation: int
    """Drawn at random for each life of the engine; what was said of another life's blocks is void."""
    role: Role
    data_address: str
    """Where its blocks are fetched; empty: it neither gives nor takes any."""
    engine: EngineInfo

    @property
    def transfers(self) -> bool:
        """Whether blocks can be fetched from it and by it."""
        return bool(self.data_address)


# ---- worker to gateway -----------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A worker's first message."""

    protocol: int
    worker: WorkerInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The only word of a worker whose engine cannot be built as asked; another attempt would fail too."""

    message: str
    """What was wrong, the limit, and what to do."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The supervisor lives, and the engine answered it so long ago."""

    step: int
    """Steps that the engine has run; a number that stands still while requests run tells of a stuck step."""
    silent_s: float
    kv_event: int = 0
    """The last that was said of the prefix cache; who has asked for them and stands elsewhere missed some."""


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step brought; one message a step."""

    outputs: list[SequenceOutput]
    stats: StepStats | None = None
    times: list[SequenceTimes] = []
    """One for each ending among the outputs, in order; none from an engine that has failed."""
    taken: list[str] = []
    """Attempts that the engine has taken in since its last word: from here on they are in its numbers."""


class KVEvents(msgspec.Struct, frozen=True, tag=True):
    """What became of the blocks of a worker's prefix cache, from event `since` to event `number`.

    Only what came of it: an identity is in one list at most. Who stands at another event than `since` has
    missed some, and asks for a snapshot.
    """

    since: int
    number: int
    stored: list[bytes]
    removed: list[bytes]


class KVSnapshot(msgspec.Struct, frozen=True, tag=True):
    """All blocks that can be found in a worker's prefix cache at event `number`; events follow from there."""

    number: int
    identities: list[bytes]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """An attempt that the worker does not take, now; another worker may."""

    request_id: str
    reason: str


class ImportReserved(msgspec.Struct, frozen=True, tag=True):
    """Blocks for the whole prompt are reserved here; all but the cached ones wait to be filled."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int


class ImportDeclined(msgspec.Struct, frozen=True, tag=True):
    """So much of the prompt is cached here that no other worker is needed; the request runs whole."""

    request_id: str
    cached_tokens: int


class ImportSettled(msgspec.Struct, frozen=True, tag=True):
    """The blocks are there and confirmed, or the reason why they will not be."""

    request_id: str
    imported: bool
    cause: Cause | None = None
    """None where they were imported."""
    reason: str = ""
    bytes_moved: int = 0
    blocks: int = 0
    wait_s: float = 0.0
    """From the wish to fetch to the first block."""
    move_s: float = 0.0
    """From there to the confirmation."""
    read: int = 0
    """How many of the blocks were read from the source's memory (NIXL); the others came as bytes (TCP)."""


class ExportOffered(msgspec.Struct, frozen=True, tag=True):
    """With this ticket the blocks of an export can be fetched, from now on, as they are computed."""

    request_id: str
    ticket: Ticket


class ExportEnded(msgspec.Struct, frozen=True, tag=True):
    """Nothing of an export is held any more."""

    request_id: str
    how: str
    """confirmed, expired or dropped"""


class Draining(msgspec.Struct, frozen=True, tag=True):
    """The worker takes no new attempts, and leaves when those that it has are over."""


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The worker closes the connection; attempts that have not ended will not."""

    reason: str


# ---- gateway to worker -----------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The worker is registered. Each side hears from the other at least every `heartbeat_s` seconds; one that
    has heard nothing for `lapse_s` seconds takes the other for gone."""

    heartbeat_s: float
    lapse_s: float


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The worker is not taken in."""

    reason: str
    later: bool = False
    """Whether it may be if it dials again; else it does not fit this cluster."""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The gateway lives."""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Run a request, from where earlier attempts had come."""

    request: GenerateRequest
    progress: Progress = Progress()
    leg: Leg = Leg.WHOLE
    offload_above: int = 0
    """An import with no more uncached prompt tokens than this runs whole."""


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Fill the reserved blocks of an import."""

    request_id: str
    ticket: Ticket


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Decode an import after these tokens, once its blocks are there or will not come. Without tokens nobody
    prefills for it any more."""

    request_id: str
    generated: list[int]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request, or its sample `index`, if it has not ended."""

    request_id: str
    index: int | None = None


class KVWanted(msgspec.Struct, frozen=True, tag=True):
    """Say what the prefix cache has, and from then on how that changes."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take nothing new, let what runs end, and leave."""


FromWorker = (
    Hello
    | StartFailed
    | Heartbeat
    | Outputs
    | KVEvents
    | KVSnapshot
    | Refused
    | ImportReserved
    | ImportDeclined
    | ImportSettled
    | ExportOffered
    | ExportEnded
    | Draining
    | Leaving
)
FromGateway = Welcome | Rejected | Beat | Submit | Fetch | Begin | Cancel | KVWanted | Drain
