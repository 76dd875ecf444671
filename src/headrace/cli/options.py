"""The engine's options as the command line spells them, shared by the commands that start one."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.config import Dtype, EngineOptions, format_size
from headrace.config.engine import Quantization, usable_cores

DEFAULTS = EngineOptions(directory="", served_name="")
DEFAULT_KV_CACHE_MEMORY = format_size(DEFAULTS.kv_cache_memory).replace(" ", "")


Model = Annotated[
    str, typer.Argument(help="A name, a directory, a GGUF file, or a hub id.", show_default=False)
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision of weights and KV cache.")]
QuantizationOption = Annotated[
    Quantization,
    typer.Option(
        "--quantization", help="Of weights: int8 reads half of bfloat16's bytes, and loses a little."
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Cores to compute on.", show_default=f"{usable_cores()}, all")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=2,
        help="Longest prompt and output together, in tokens.",
        show_default="what model and KV cache allow",
    ),
]
MaxNumSeqs = Annotated[int, typer.Option("--max-num-seqs", min=1, help="Sequences that run at once.")]
MaxNumBatchedTokens = Annotated[
    int, typer.Option("--max-num-batched-tokens", min=1, help="Tokens computed in one step.")
]
KvCacheMemory = Annotated[
    str, typer.Option("--kv-cache-memory", metavar="SIZE", help="For the KV cache, as in 512MiB or 2GiB.")
]
BlockSize = Annotated[int, typer.Option("--block-size", min=1, max=1024, help="Positions of one KV block.")]
NoPrefixCaching = Annotated[
    bool, typer.Option("--no-prefix-caching", help="Compute every prompt from its first token.")
]
BatchInvariant = Annotated[
    bool, typer.Option("--batch-invariant", help="The same bits of output whatever else runs.")
]
