"""The tensors that describe one step to the model: which tokens, of which sequences, in which KV pages.

Flows in: nothing but plain integers of a step plan. Flows out: a `Batch`, read by `models` and by
every attention kernel. It knows neither requests nor sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input, sequences laid end to end ("ragged", no padding).

    With T tokens of S sequences:

    token_ids:   [T] int32
    positions:   [T] int32, position of each token in its sequence
    query_start: [S + 1] int32, sequence s owns tokens query_start[s]:query_start[s + 1]
    context:     [S] int32, keys in the cache after this step writes its own: start + count
    tables:      one [S, max_blocks] int32 per KV group, unit stride in the last dimension; entry j
                 is the page that holds positions j * block_size onwards. Entries that a sliding
                 window has left behind are -1 and must not be read.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context: Tensor
    tables: tuple[Tensor, ...]


def no_sequences() -> Batch:
    """The batch of rows that belong to no sequence, for programs that neither rotate nor attend."""
    none = torch.empty(0, dtype=torch.int32)
    return Batch(none, none, torch.zeros(1, dtype=torch.int32), none, ())
