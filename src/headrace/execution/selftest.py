"""Does a row's result depend on what runs beside it? Asked of the loaded model before it serves.

Kernel libraries choose algorithms by shape, so batch invariance is a property of these weights on this
machine, not of a rule. The test runs one sequence in every way the scheduler could: whole, in chunks, token
by token, and among others in growing batches, and compares bits of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import torch

from headrace.kernels.batch import Batch
from headrace.models.decoder import Decoder

_LENGTH = 70  # positions of the probe: more than a key tile, not a multiple of anything
_TAIL = 6  # positions at its end that are compared


class NotBatchInvariant(RuntimeError):
    """The same row gave other bits in another batch."""


class _Probe:
    """One sequence in pages of its own; `run` computes spans of several probes in one batch."""

    def __init__(self, length: int, seed: int, vocab_size: int, pages: Iterable[int], groups: int, size: int):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(vocab_size, (length,), generator=generator, dtype=torch.int32)
        blocks = -(-length // size)
        source = iter(pages)
        self.tables = [[next(source) for _ in range(blocks)] for _ in range(groups)]


def check_batch_invariance(
    decoder: Decoder, *, groups: int, num_blocks: int, block_size: int, max_num_seqs: int
) -> None:
    """Raise NotBatchInvariant, saying which way of running differs; the KV pool's content is lost."""
    vocab = decoder.config.vocab_size
    length = min(_LENGTH, num_blocks // groups * block_size, decoder.max_model_len)
    tail = range(length - _TAIL, length)
    pages = count()
    probe = _Probe(length, 0, vocab, pages, groups, block_size)

    _run(decoder, [(probe, 0, length - _TAIL)])
    alone = torch.cat([_run(decoder, [(probe, p, p + 1)]) for p in tail])

    _same(decoder, alone, _run(decoder, [(probe, 0, length)])[-_TAIL:], "computing a prompt in one chunk")
    for chunk in (16, 37):
        rows = torch.cat(
            [_run(decoder, [(probe, a, min(a + chunk, length))]) for a in range(0, length, chunk)]
        )
        _same(decoder, alone, rows[-_TAIL:], f"computing a prompt in chunks of {chunk}")

    spare = (num_blocks - groups * -(-length // block_size)) // groups
    others = [
        _Probe(1, seed, vocab, pages, groups, block_size) for seed in range(1, min(spare, max_num_seqs))
    ]
    sizes = sorted({size for size in (1, 2, 3, 5, 8, 13, 21, 32, 64, len(others)) if size <= len(others)})
    for size in sizes:
        beside = [(other, 0, 1) for other in others[:size]]
        rows = torch.cat([_run(decoder, [*beside, (probe, p, p + 1)])[-1:] for p in tail[-2:]])
        _same(decoder, alone[-2:], rows, f"decoding beside {size} other sequences")
    if others:
        beside = [(other, 0, 1) for other in others[:3]]
        rows = _run(decoder, [*beside, (probe, 0, length)])[-_TAIL:]
        _same(decoder, alone, rows, "computing a prompt beside decoding sequences")


@torch.inference_mode()
def _run(decoder: Decoder, spans: Sequence[tuple[_Probe, int, int]]) -> torch.Tensor:
    """Logits [rows, vocab] of every position in the spans (probe, begin, end)."""
    starts = [0]
    for _, begin, end in spans:
        starts.append(starts[-1] + end - begin)
    width = max(len(probe.tables[0]) for probe, _, _ in spans)
    tables = tuple(
        torch.tensor(
            [probe.tables[g] + [-1] * (width - len(probe.tables[g])) for probe, _, _ in spans],
            dtype=torch.int32,
        )
        for g in range(len(spans[0][0].tables))
    )
    batch = Batch(
        token_ids=torch.cat([probe.tokens[begin:end] for probe, begin, end in spans]),
        positions=torch.cat([torch.arange(begin, end, dtype=torch.int32) for _, begin, end in spans]),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
        tables=tables,
    )
    return decoder.logits(decoder.forward(batch))


def _same(decoder: Decoder, expected: torch.Tensor, got: torch.Tensor, way: str) -> None:
    if not torch.equal(expected, got):
        apart = (expected - got).abs().max().item()
        kernels = decoder.kernels
        raise NotBatchInvariant(
            f"{way} changed the logits by up to {apart:.3g} with the {kernels.name} kernels in "
            f"{str(kernels.dtype).removeprefix('torch.')}; serve without batch_invariant, or choose other "
            "kernels or another dtype"
        )
