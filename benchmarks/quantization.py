"""What int8 weights lose on text: perplexity, KL divergence and top-1 agreement against bfloat16 and float32.

    python benchmarks/quantization.py [--model smollm2-135m] [--windows 16] [--length 512] [--file TEXT]

The text is the language reference that comes with every Python (`pydoc_data.topics`, PSF licence): the
longest topics, one window of each; or a file of yours. Each window begins as the model expects a text to
begin. All positions count but the first 32 of a window. Divergence is in nats, from the more precise to the
less precise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from headrace.config.engine import usable_cores
from headrace.kernels.base import Quantization
from headrace.kernels.batch import Batch
from headrace.kernels.native import NativeKernels
from headrace.models import load_decoder
from headrace.models.decoder import Decoder
from headrace.models.kv_groups import kv_groups
from headrace.store import resolve
from headrace.text import Tokenizer

BLOCK_SIZE = 16
WARM_UP = 32
ROWS_AT_ONCE = 64
PRECISIONS: dict[str, tuple[torch.dtype, Quantization]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.bfloat16, "int8"),
}
PAIRS = (("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8"))


def windows(tokenizer: Tokenizer, file: Path | None, count: int, length: int) -> list[list[int]]:
    """At most `count` runs of `length` token ids."""
    if file is None:
        texts = sorted(topics.values(), key=len, reverse=True)[:count]
        return [ids[:length] for ids in map(tokenizer.encode, texts) if len(ids) >= length]
    begin = tokenizer.encode("")
    ids = tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
    size = length - len(begin)
    found = [begin + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return found[:count]


class Model:
    """One precision of the model, over a KV cache for one window."""

    def __init__(self, directory: Path, name: str, length: int, threads: int) -> None:
        dtype, quantization = PRECISIONS[name]
        kernels = NativeKernels(dtype=dtype, quantization=quantization, threads=threads)
        self._decoder: Decoder = load_decoder(directory, kernels, length)
        config = self._decoder.config
        groups = kv_groups(config)
        blocks = -(-length // BLOCK_SIZE)
        pages = kernels.allocate_kv(
            blocks * len(groups), len(groups[0].layers), config.kv_heads, config.head_dim, BLOCK_SIZE
        )
        self._decoder.attach_kv(pages, groups, BLOCK_SIZE)
        tables = torch.arange(blocks * len(groups), dtype=torch.int32).view(len(groups), 1, blocks)
        self._tables = tuple(tables)

    def hidden(self, ids: list[int]) -> Tensor:
        """[length, hidden]"""
        length = len(ids)
        return self._decoder.forward(
            Batch(
                torch.tensor(ids, dtype=torch.int32),
                torch.arange(length, dtype=torch.int32),
                torch.tensor([0, length], dtype=torch.int32),
                torch.tensor([length], dtype=torch.int32),
                self._tables,
            )
        )

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[rows, vocab]"""
        return self._decoder.logits(hidden).log_softmax(-1)


@dataclass
class Totals:
    """Sums over `count` positions: of surprise in nats by precision, divergence and agreement by pair."""

    count: int
    surprise: dict[str, float]
    divergence: dict[tuple[str, str], float]
    agreement: dict[tuple[str, str], int]


def _rows(
    hidden: dict[str, Tensor], models: dict[str, Model], last: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    for begin in range(WARM_UP, last, ROWS_AT_ONCE):
        rows = slice(begin, min(begin + ROWS_AT_ONCE, last))
        yield rows, {name: model.log_probabilities(hidden[name][rows]) for name, model in models.items()}


@torch.inference_mode()
def measure(models: dict[str, Model], texts: list[list[int]]) -> Totals:
    totals = Totals(0, dict.fromkeys(models, 0.0), dict.fromkeys(PAIRS, 0.0), dict.fromkeys(PAIRS, 0))
    for ids in texts:
        hidden = {name: model.hidden(ids) for name, model in models.items()}
        following = torch.tensor(ids[1:])
        for rows, found in _rows(hidden, models, len(ids) - 1):
            totals.count += rows.stop - rows.start
            for name, log in found.items():
                totals.surprise[name] -= log.gather(1, following[rows, None]).sum(dtype=torch.float64).item()
            for pair in PAIRS:
                exact, coarse = (found[name] for name in pair)
                totals.divergence[pair] += (exact.exp() * (exact - coarse)).sum(dtype=torch.float64).item()
                totals.agreement[pair] += int((exact.argmax(-1) == coarse.argmax(-1)).sum())
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--file", type=Path, help="text in UTF-8 instead of Python's language reference")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()

    files = resolve(options.model)
    texts = windows(Tokenizer.from_model(files), options.file, options.windows, options.length)
    if not texts:
        parser.error(
            f"the text has fewer than {options.length} tokens; give more of it or a smaller --length"
        )
    models = {name: Model(files.directory, name, options.length, options.threads) for name in PRECISIONS}
    totals = measure(models, texts)
    print(f"{files.name}: {totals.count} positions of {len(texts)} windows of {options.length} tokens")
    for name, surprise in totals.surprise.items():
        print(f"  {name:9} perplexity {math.exp(surprise / totals.count):.4f}")
    for pair in PAIRS:
        mean, share = totals.divergence[pair] / totals.count, totals.agreement[pair] / totals.count
        print(f"  {pair[0]} -> {pair[1]:9} mean KL {mean:.2e}  top-1 agreement {share:.4f}")


if __name__ == "__main__":
    main()
