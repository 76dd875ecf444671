"""Safetensors files as one set of named tensors, read by slices, and the parts that parameters are made of.

A parameter is described by `Part`s before anything is read: the tensor's name, its whole shape, and how it
is cut for a place in a mesh. So the whole checkpoint is checked against the description first, and then
each rank reads only its own bytes. Files are read through one small buffer, not mapped: pages of a mapping
count as the process's memory until it ends, and each of them costs a fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFER_BYTES: Final = 4 << 20
_SHOWN: Final = 8
_INDEX: Final = "model.safetensors.index.json"

# rows, columns: cut into equal runs of `Part.units` along dimension 0 or 1; fewer units than ranks are
#                repeated, each on as many neighbouring ranks (keys and values of grouped-query attention)
# vocabulary:    rows, in runs that may differ by one from rank to rank
# whole:         on every rank
# first:         on rank 0 alone (the bias of a projection whose partial sums are added up)
Cut = Literal["rows", "columns", "vocabulary", "whole", "first"]


class WeightsError(ValueError):
    """Weights that do not fit the model's configuration; the text names tensors and shapes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A place among the ranks that split each layer between them."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is outside of a world of {self.world}")


WHOLE: Final = Shard(0, 1)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint and how ranks share it.

    shape: of the whole tensor
    units: what a cut must not go through: heads for attention, rows for the rest
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut = "whole"
    units: int = 1

    def span(self, shard: Shard) -> tuple[int, int, int]:
        """(dimension, begin, end) of this rank's slice."""
        match self.cut:
            case "whole":
                return 0, 0, self.shape[0]
            case "first":
                return 0, 0, self.shape[0] if shard.rank == 0 else 0
            case "vocabulary":
                rows = self.shape[0]
                return 0, rows * shard.rank // shard.world, rows * (shard.rank + 1) // shard.world
            case "rows" | "columns":
                dimension = 0 if self.cut == "rows" else 1
                size = self.shape[dimension] // self.units
                if self.units % shard.world == 0:
                    count = self.units // shard.world
                    return dimension, shard.rank * count * size, (shard.rank + 1) * count * size
                if shard.world % self.units == 0:
                    unit = shard.rank * self.units // shard.world
                    return dimension, unit * size, (unit + 1) * size
                raise WeightsError(
                    f"{self.name} {list(self.shape)} has {self.units} units along dimension {dimension}, "
                    f"which {shard.world} ranks cannot share; choose a divisor or a multiple of {self.units}"
                )

    def local_shape(self, shard: Shard) -> tuple[int, ...]:
        dimension, begin, end = self.span(shard)
        return (*self.shape[:dimension], end - begin, *self.shape[dimension + 1 :])


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file: row-major, from byte `begin`. `dtype` is the format's word."""

    file: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Rows begin to end - 1 in runs: the first row's number and a view that the next run overwrites."""
        dtype = _DTYPES[self.dtype]
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        most = max(1, _BUFFER_BYTES // max(1, row_bytes))
        buffer = memoryview(bytearray(min(most, end - begin) * row_bytes))
        self.file.seek(self.begin + begin * row_bytes)
        for first in range(begin, end, most):
            count = min(most, end - first)
            run = buffer[: count * row_bytes]
            if (got := self.file.readinto(run)) != len(run):  # type: ignore[attr-defined]
                raise WeightsError(
                    f"{self.file.name} ended {len(run) - got} bytes early; it was changed while it was read"
                )
            yield first, torch.frombuffer(run, dtype=dtype).view(count, *self.shape[1:])


class Checkpoint:
    """The tensors of a model directory, by name. A context manager that holds the files open.

    Takes `model.safetensors`, the shards that `model.safetensors.index.json` lists, or else all
    `*.safetensors` in the directory.
    """

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._tensors: dict[str, _Stored] = {}
        try:
            for path in _files(directory):
                self._tensors |= _open(path, self._stack)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.clear()
        self._stack.close()

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def check(self, parts: Iterable[Part], *, ignored: Collection[str] = ()) -> None:
        """Refuse tensors that are missing, unexpected, of another shape, or not plain floating point.

        `ignored` are names that may be there and are not read.
        """
        problems = []
        expected = {part.name: part for part in parts}
        for name, part in expected.items():
            stored = self._tensors.get(name)
            if stored is None:
                problems.append(f"{name} {list(part.shape)} is missing")
            elif stored.shape != part.shape:
                problems.append(
                    f"{name} is {list(stored.shape)}, but config.json makes it {list(part.shape)}"
                )
            elif stored.dtype not in _DTYPES:
                problems.append(
                    f"{name} is stored as {stored.dtype}; supported: {', '.join(sorted(_DTYPES))}"
                )
        problems += [
            f"{name} {list(self._tensors[name].shape)} has no place in this model"
            for name in sorted(self._tensors.keys() - expected.keys() - set(ignored))
        ]
        if problems:
            more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
            raise WeightsError(f"the weights do not fit config.json:{listed}{more}")

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        left, right = (
            self.load([Part(name, self._tensors[name].shape)], WHOLE, torch.float32) for name in (one, other)
        )
        return torch.equal(left, right)

    def load(self, parts: Iterable[Part], shard: Shard, dtype: torch.dtype) -> Tensor:
        """This rank's slices of `parts`, one below the other, in memory of their own, as `dtype`."""
        parts = tuple(parts)
        shapes = [part.local_shape(shard) for part in parts]
        result = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=dtype)
        row = 0
        for part, shape in zip(parts, shapes, strict=True):
            dimension, begin, end = part.span(shard)
            stored = self._tensors[part.name]
            first, last = (begin, end) if dimension == 0 else (0, shape[0])
            for number, rows in stored.rows(first, last):
                place = result[row + number - first :][: rows.shape[0]]
                place.copy_(rows if dimension == 0 else rows[:, begin:end])
            row += shape[0]
        return result


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    single = directory / "model.safetensors"
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        raise WeightsError(f"{directory} holds no *.safetensors file")
    return paths


def _open(path: Path, stack: ExitStack) -> dict[str, _Stored]:
    """The tensors of a file that stays open as long as `stack`."""
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file's length
            pass
        file = stack.enter_context(path.open("rb", buffering=0))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
