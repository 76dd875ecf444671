"""Drives a decoder the way an executor does: ragged batches over scrambled pages, pages freed by windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from headrace.kernels.base import Kernels
from headrace.kernels.batch import Batch
from headrace.kernels.reference import TorchKernels
from headrace.models.decoder import Decoder
from headrace.models.kv_groups import kv_groups

LIBRARIES = ("reference", "native")


def make_kernels(
    library: str, dtype: torch.dtype = torch.float32, *, batch_invariant: bool = False, threads: int = 1
) -> Kernels:
    """A kernel library by name; skips the test where the native one is not built.

    One thread unless asked: torch's threads wait for each other at every small operation, and beside other
    processes that costs more than a second one gains.
    """
    if library == "reference":
        return TorchKernels(dtype=dtype, batch_invariant=batch_invariant, threads=threads)
    for module in ("headrace._native", "headrace.kernels.native"):
        pytest.importorskip(module, reason=f"the native kernels are not built: no {module}")
    from headrace.kernels.native import NativeKernels

    return NativeKernels(dtype=dtype, batch_invariant=batch_invariant, threads=threads)


class PagedRun:
    """Sequences that advance through one pool of pages, by any number of tokens each per step.

    Pages are handed out at random. What a window has left behind is overwritten with NaN and struck out of
    the table, so that one read of it shows.
    """

    def __init__(
        self, decoder: Decoder, sequences: Sequence[Tensor], *, block_size: int, seed: int = 0, room: int = 0
    ) -> None:
        """`room` is by how many tokens a sequence may be extended."""
        self._decoder = decoder
        self._sequences = [tokens.to(torch.int32) for tokens in sequences]
        self._block_size = block_size
        self._groups = kv_groups(decoder.config)
        blocks = [-(-(len(tokens) + room) // block_size) for tokens in sequences]
        spare = 3  # so that not every page is in use
        count = sum(blocks) * len(self._groups) + spare
        config = decoder.config
        self._pages = decoder.kernels.allocate_kv(
            count, len(self._groups[0].layers), config.kv_heads, config.head_dim, block_size
        )
        decoder.attach_kv(self._pages, self._groups, block_size)
        pages = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self._tables = torch.full((len(self._groups), len(sequences), max(blocks)), -1, dtype=torch.int32)
        for table in self._tables:
            for row, needed in zip(table, blocks, strict=True):
                row[:needed] = torch.tensor([pages.pop() for _ in range(needed)])
        self.computed = [0] * len(sequences)

    def extend(self, sequence: int, tokens: Sequence[int]) -> None:
        self._sequences[sequence] = torch.cat(
            (self._sequences[sequence], torch.tensor(tokens, dtype=torch.int32))
        )

    @torch.inference_mode()
    def step(self, counts: Mapping[int, int], last: int | None = None) -> dict[int, Tensor]:
        """Compute the next counts[s] tokens of each sequence s → logits, [counts[s], vocab] each.

        With `last`, logits of at most so many tokens at the end of each.
        """
        tokens, positions, starts, context = [], [], [0], []
        for sequence, count in counts.items():
            begin = self.computed[sequence]
            tokens.append(self._sequences[sequence][begin : begin + count])
            positions.append(torch.arange(begin, begin + count, dtype=torch.int32))
            starts.append(starts[-1] + count)
            context.append(begin + count)
        rows = list(counts)
        batch = Batch(
            torch.cat(tokens),
            torch.cat(positions),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(context, dtype=torch.int32),
            tuple(self._tables[group, rows].contiguous() for group in range(len(self._groups))),
        )
        hidden = torch.split(self._decoder.forward(batch), list(counts.values()))
        wanted = [rows if last is None else rows[-last:] for rows in hidden]
        logits = torch.split(self._decoder.logits(torch.cat(wanted)), [len(rows) for rows in wanted])
        for sequence, count in counts.items():
            self.computed[sequence] += count
        self._free_left_behind()
        return dict(zip(counts, logits, strict=True))

    def _free_left_behind(self) -> None:
        for group, members in enumerate(self._groups):
            if members.window is None:
                continue
            for sequence, computed in enumerate(self.computed):
                unseen = max(0, computed - members.window + 1) // self._block_size
                for block in range(unseen):
                    page = int(self._tables[group, sequence, block])
                    if page >= 0:
                        self._pages[page].fill_(float("nan"))
                        self._tables[group, sequence, block] = -1


def run_whole(run: PagedRun, lengths: Sequence[int]) -> list[Tensor]:
    """All of every sequence in one step."""
    logits = run.step(dict(enumerate(lengths)))
    return [logits[sequence] for sequence in range(len(lengths))]


def run_chunks(run: PagedRun, lengths: Sequence[int], chunk: int) -> list[Tensor]:
    """At most `chunk` tokens of each sequence per step; later sequences join later and end at other times."""
    found: list[list[Tensor]] = [[] for _ in lengths]
    step = 0
    while any(done < length for done, length in zip(run.computed, lengths, strict=True)):
        counts = {
            sequence: min(chunk, length - run.computed[sequence])
            for sequence, length in enumerate(lengths)
            if step >= sequence and run.computed[sequence] < length
        }
        for sequence, logits in run.step(counts).items():
            found[sequence].append(logits)
        step += 1
    return [torch.cat(each) for each in found]
