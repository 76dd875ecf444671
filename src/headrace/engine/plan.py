"""What the scheduler tells an executor to run in one step, and what the executor answers.

A plan is plain data: integers of rows, positions and blocks. The executor keeps one row of state for each
running sequence (its tokens, block tables and sampling state), so a plan only says what is new. That is
why a sampled token need not come back to Python before the next step that reads it is planned.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import msgspec

from headrace.protocol.requests import RequestError, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class RowStart:
    """A row is given to a sequence, new or resumed; whatever the row held is void."""

    row: int
    tokens: list[int]
    """The prompt, and after a preemption the output so far."""
    prompt_length: int
    sampling: SamplingParams
    seed: int
    prompt_logprobs: int | None
    """Alternatives to report for each prompt position; None reports nothing."""
    tables: list[list[int]]
    """Per KV group, the blocks that come from the prefix cache (-1: behind the window)."""


class ScheduledRow(msgspec.Struct, frozen=True):
    """Compute positions start to start + count - 1 of a row, and sample what follows if `sample`.

    A position whose token is not known here was sampled by a step still in flight: the executor has it.
    """

    row: int
    start: int
    count: int
    sample: bool
    new_blocks: tuple[list[int], ...]
    """Per KV group, blocks appended to the row's table before the step. Not to be changed: rows that get none
    share one."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Row starts come first, then the rows run."""

    number: int
    starts: list[RowStart]
    rows: list[ScheduledRow]

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan; lists are parallel to `plan.rows`."""

    tokens: list[list[int]]
    """The tokens sampled for each row: none, one, or several where drafts were accepted."""
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index into `plan.rows`, one for each sampled token, where asked for."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index into `plan.rows`: of the prompt tokens that the row's positions predict."""
    failed: dict[int, RequestError] = field(default_factory=dict)
    """By index into `plan.rows`, why no token could be chosen where one was due. It ends that sequence alone;
    the step's positions do not count as computed."""
    kernel_s: float = 0.0
    """Seconds spent in kernels, for the share of a step that is not one."""


class Executor(ABC):
    """Runs plans in the order in which they are submitted."""

    depth: int
    """Steps that may be in flight: 1 inline, 2 overlapped, the number of stages with a pipeline."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Start a step. An inline executor returns a future that is done."""

    @abstractmethod
    def close(self) -> None:
        """Free what the executor holds; no step is in flight."""
