"""The executor that runs step plans on a torch decoder, in this process.

It keeps one row of state for each running sequence: its tokens, block tables and sampler. A plan says what
is new; the runner gathers the step's tokens, runs the decoder once, and samples where the plan asks. It
knows neither requests nor why a row runs.
"""

from __future__ import annotations

import asyncio

import numpy as np
import torch

from headrace.engine.plan import Executor, RowStart, ScheduledRow, StepPlan, StepResult
from headrace.execution.sampler import NoChoice, RowSampler, sample_rows, token_logprobs
from headrace.kernels.batch import Batch
from headrace.models.decoder import Decoder
from headrace.protocol.requests import RequestError, TokenLogprobs
from headrace.world.shared_memory import SharedMemory

_LOGIT_ROWS = 32  # prompt positions whose logits are in memory at once: [32, vocab] float32


class TorchExecutor(Executor):
    """Runs each plan to its end inside `submit`."""

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        groups: int,
        max_model_len: int,
        block_size: int,
        eos_token_ids: frozenset[int],
        memory: SharedMemory | None = None,
    ) -> None:
        """`memory` is what the decoder's KV pool lies in, where that is shared; `close` lets go of it."""
        self._decoder = decoder
        self._memory = memory
        self._block_size = block_size
        self._eos_token_ids = eos_token_ids
        self._tokens = np.zeros((rows, max_model_len), np.int32)
        blocks = -(-max_model_len // block_size)
        self._tables = [np.full((rows, blocks), -1, np.int32) for _ in range(groups)]
        self._blocks_known = np.zeros((groups, rows), np.int64)
        self._samplers: list[RowSampler | None] = [None] * rows
        self._prompts: list[RowStart | None] = [None] * rows
        """The start of each row whose prompt log-probabilities are wanted."""

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        future.set_result(self.run(plan))
        return future

    def close(self) -> None:
        """Whoever opens the KV pool from now on finds nothing."""
        if self._memory is not None:
            self._memory.close()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """One step: forward over all rows, then a token for each row that samples."""
        for start in plan.starts:
            self._start(start)
        kernel_s = self._decoder.kernels.busy_s
        hidden = self._decoder.forward(self._batch(plan.rows))
        tokens, logprobs, failed = self._sample(plan, hidden)
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return StepResult(tokens, logprobs, prompt_logprobs, failed, self._decoder.kernels.busy_s - kernel_s)

    # ---- before the forward pass ---------------------------------------------------------------------

    def _start(self, start: RowStart) -> None:
        row = start.row
        self._tokens[row, : len(start.tokens)] = start.tokens
        for group, table in enumerate(start.tables):
            self._tables[group][row, : len(table)] = table
            self._blocks_known[group, row] = len(table)
        self._samplers[row] = RowSampler(start, self._decoder.config.vocab_size, self._eos_token_ids)
        self._prompts[row] = None if start.prompt_logprobs is None else start

    def _batch(self, rows: list[ScheduledRow]) -> Batch:
        for row in rows:
            if any(row.new_blocks):
                self._append_blocks(row)
        places = np.array([(row.row, row.start, row.count) for row in rows], np.int64)
        indices, starts, counts = places.T
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        token_ids = self._tokens[np.repeat(indices, counts), positions]
        context = (starts + counts).astype(np.int32)
        used = -(-int(context.max()) // self._block_size)
        return Batch(
            torch.from_numpy(token_ids),
            torch.from_numpy(positions.astype(np.int32)),
            torch.from_numpy(query_start),
            torch.from_numpy(context),
            tuple(torch.from_numpy(table[indices, :used]) for table in self._tables),
        )

    def _append_blocks(self, row: ScheduledRow) -> None:
        for group, blocks in enumerate(row.new_blocks):
            known = self._blocks_known[group, row.row]
            self._tables[group][row.row, known : known + len(blocks)] = blocks
            self._blocks_known[group, row.row] += len(blocks)

    # ---- after it ------------------------------------------------------------------------------------

    def _sample(
        self, plan: StepPlan, hidden: torch.Tensor
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]], dict[int, RequestError]]:
        """A token for each row that samples, from its last position's hidden state, or why there is none."""
        tokens: list[list[int]] = [[] for _ in plan.rows]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        failed: dict[int, RequestError] = {}
        last, sampling = -1, []
        for i, row in enumerate(plan.rows):
            last += row.count
            if row.sample:
                sampling.append((i, row, last))
        if not sampling:
            return tokens, logprobs, failed
        if len(sampling) < len(hidden):  # else each row is one token that samples
            hidden = hidden[torch.tensor([last for _, _, last in sampling])]
        logits = self._decoder.logits(hidden).numpy()
        samplers = [self._started(row.row) for _, row, _ in sampling]
        positions = [row.start + row.count for _, row, _ in sampling]
        chosen = sample_rows(samplers, logits, positions)
        for (i, row, _), row_logits, sampler, position, token in zip(
            sampling, logits, samplers, positions, chosen, strict=True
        ):
            if isinstance(token, NoChoice):
                failed[i] = token.error
                continue
            if position < self._tokens.shape[1]:
                self._tokens[row.row, position] = token
            tokens[i].append(token)
            if sampler.wants_logprobs is not None:
                logprobs[i] = [token_logprobs(row_logits, token, sampler.wants_logprobs)]
        return tokens, logprobs, failed

    def _started(self, row: int) -> RowSampler:
        sampler = self._samplers[row]
        if sampler is None:
            raise RuntimeError(f"row {row} runs before it was started")
        return sampler

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """For each row that asks: of the prompt tokens that this step's positions predict."""
        found: dict[int, list[TokenLogprobs]] = {}
        begin = 0
        for i, row in enumerate(plan.rows):
            start = self._prompts[row.row]
            if start is not None and start.prompt_logprobs is not None:
                count = min(row.count, start.prompt_length - 1 - row.start)
                found[i] = []
                for j in range(0, count, _LOGIT_ROWS):
                    upto = min(count, j + _LOGIT_ROWS)
                    logits = self._decoder.logits(hidden[begin + j : begin + upto]).numpy()
                    targets = start.tokens[row.start + 1 + j : row.start + 1 + upto]
                    found[i] += [
                        token_logprobs(row_logits, token, start.prompt_logprobs)
                        for row_logits, token in zip(logits, targets, strict=True)
                    ]
            begin += row.count
        return found
