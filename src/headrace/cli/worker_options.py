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
from headrace.config.engine import DEFAULT_STEP_TIMEOUT_S

if TYPE_CHECKING:
    from headrace.store import ModelFiles


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
    no_prefix_caching: NoPrefixCaching = False
    batch_invariant: BatchInvariant = False
    step_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds that a step may take; an engine that takes longer is taken for stuck."
        ),
    ] = DEFAULT_STEP_TIMEOUT_S

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
            block_size=self.block_size,
            prefix_caching=not self.no_prefix_caching,
            batch_invariant=self.batch_invariant,
            **more,
        )
