"""What a load test is asked to be: the options of `headrace bench`, and their defaults.

None is an option that was not given; which of them go together is for `bench.setup` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dataset = Literal["random", "shared-prefix", "multi-turn", "file", "trace"]

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_VOCAB_SIZE = 32_000
"""Every common model has at least this many token ids."""
DEFAULT_INPUT_LEN = 128
DEFAULT_OUTPUT_LEN = 64
DEFAULT_PREFIXES = 4
DEFAULT_PREFIX_LEN = 256
DEFAULT_TURNS = 4
DEFAULT_THINK_TIME_S = 1.0
DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 8
DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """What is asked of the server. Lengths in tokens, times in seconds."""

    dataset: Dataset = "random"
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float | None = None
    vocab_size: int | None = None
    prefixes: int | None = None
    prefix_len: int | None = None
    turns: int | None = None
    think_time: float | None = None
    path: Path | None = None
    time_scale: float | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How much is sent, and when. Times in seconds; rates in requests (or sessions) a second."""

    rate: float | None = None
    burstiness: float | None = None
    ramp: str | None = None
    """`FROM:TO`, two rates."""
    concurrency: int | None = None
    num_requests: int | None = None
    duration: float | None = None
    timeout: float = DEFAULT_TIMEOUT_S
