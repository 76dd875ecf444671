"""Programs of native kernels: a forward pass recorded once, then run in one call without the interpreter.

Recording runs the pass over tensors without memory (torch's "meta" device): each result becomes a slot, each
operation a call in terms of slots. Slots whose lives do not overlap share memory. A workspace holds them,
so many bytes for each row, so a program serves any number of rows and a small step touches little memory.

It must not know what a model is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import _native
from headrace.kernels.base import AttentionSpec, Build, KVCacheLayer, Program
from headrace.kernels.batch import Batch, no_sequences
from headrace.kernels.huge_pages import Workspace
from headrace.kernels.native_operations import (
    TYPES,
    NativeOperations,
    Packed,
    Rotation,
    address,
    check_batch,
    pages_of,
)

# In place of an offset: slots that are no part of the workspace.
_INPUT, _OUTPUT = -1, -2
_LINE_BYTES = 64


@dataclass(slots=True)
class _Slot:
    """A tensor of the recording, and the first and last call that touch it."""

    tensor: Tensor
    born: int
    died: int

    @property
    def row_bytes(self) -> int:
        size = self.tensor.shape[1] * self.tensor.dtype.itemsize
        return -(-size // _LINE_BYTES) * _LINE_BYTES


class NativeProgram(Program):
    """A recorded program; `capture` makes it."""

    def __init__(self, recorder: Recorder, x: Tensor, result: Tensor, workspace: Workspace) -> None:
        self._program = recorder.program
        self._kept = recorder.kept
        self._groups = sorted(recorder.groups)
        self._input_dtype = x.dtype
        self._input_columns = x.shape[1:]
        self._columns = result.shape[1]
        self._dtype = result.dtype
        self._workspace = workspace
        offsets, self._row_bytes = _place(recorder.slots, recorder.number(result))
        self._program.place(offsets)

    @property
    def row_bytes(self) -> int:
        """Bytes of workspace for each row."""
        return self._row_bytes

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        if x.dtype is not self._input_dtype or x.shape[1:] != self._input_columns or not x.is_contiguous():
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; this program takes contiguous "
                f"{self._input_dtype}, [rows{''.join(f', {n}' for n in self._input_columns)}]"
            )
        rows = x.shape[0]
        for group in self._groups:
            check_batch(batch, group, rows)
        result = torch.empty((rows, self._columns), dtype=self._dtype)
        self._program.run(
            x.data_ptr(),
            rows,
            result.data_ptr(),
            self._workspace.at_least(self._row_bytes * rows),
            batch.query_start.data_ptr(),
            batch.positions.data_ptr(),
            batch.query_start.shape[0] - 1,
            batch.positions.shape[0],
            [(table.data_ptr(), table.stride(0), table.shape[1]) for table in batch.tables],
        )
        return result


def capture(build: Build, x: Tensor, *, dtype: torch.dtype, workspace: Workspace) -> NativeProgram:
    """Record `build` for inputs like x: [any number of rows, ...]."""
    recorder = Recorder(dtype)
    example = torch.empty((1, *x.shape[1:]), dtype=x.dtype, device="meta")
    recorder.add(example)
    result = build(recorder, example, no_sequences())
    return NativeProgram(recorder, example, result, workspace)


def _place(slots: list[_Slot], result: int) -> tuple[list[int], int]:
    """Offsets of slots, each the lowest that no slot alive at the same time takes, and where they end."""
    offsets: list[int] = []
    end = 0
    for number, slot in enumerate(slots):
        if number in (0, result):
            offsets.append(_OUTPUT if number == result else _INPUT)
            continue
        taken = sorted(
            (offset, offset + other.row_bytes)
            for offset, other in zip(offsets, slots, strict=False)
            if offset >= 0 and other.died >= slot.born
        )
        at = 0
        for begin, until in taken:
            if begin - at >= slot.row_bytes:
                break
            at = max(at, until)
        offsets.append(at)
        end = max(end, at + slot.row_bytes)
    return offsets, end


class Recorder(NativeOperations):
    """Writes calls down instead of making them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._type = TYPES[dtype]
        self.program = _native.Program()
        self.slots: list[_Slot] = []
        """By number; the first is the input."""
        self.groups: set[int] = set()
        self.kept: list[object] = []
        """What the program holds addresses of."""
        self._numbers: dict[int, int] = {}
        self._calls = 0

    def add(self, tensor: Tensor) -> Tensor:
        self._numbers[id(tensor)] = len(self.slots)
        self.slots.append(_Slot(tensor, self._calls, self._calls))
        return tensor

    def number(self, tensor: Tensor) -> int:
        """The slot behind a tensor, which lives at least until now."""
        number = self._numbers.get(id(tensor))
        if number is None:
            raise ValueError(
                f"a {tuple(tensor.shape)} {tensor.dtype} is not one of this program's activations: between "
                "input and result a forward pass uses operations alone"
            )
        self.slots[number].died = self._calls
        return number

    def _keep(self, *objects: object) -> None:
        self.kept += objects
        self._calls += 1

    def _new(self, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return self.add(torch.empty((like.shape[0], columns), dtype=dtype, device="meta"))

    def _embed(self, token_ids: Tensor, table: Tensor, scale: float, result: Tensor) -> None:
        if self.number(token_ids) != 0:
            raise ValueError("a program embeds its input and nothing else")
        vocab, columns = table.shape
        self.program.embed(table.data_ptr(), vocab, columns, self._type, scale, self.number(result))
        self._keep(table)

    def _soft_cap(self, x: Tensor, cap: float) -> None:
        self.program.soft_cap(self.number(x), x.shape[1], cap)
        self._keep()

    def _linear(
        self, x: Tensor, packed: Packed, outputs: int, gate: int, result: Tensor, output: int
    ) -> None:
        self.program.linear(
            self.number(x),
            packed.address,
            packed.bias_address,
            outputs,
            packed.in_features,
            self._type,
            packed.type,
            gate,
            self.number(result),
            packed.out_features,
            output,
        )
        self._keep(packed)

    def _norm(self, x: Tensor, weight: Tensor, eps: float, result: Tensor, output: int) -> None:
        self.program.rms_norm(self.number(x), weight.data_ptr(), x.shape[1], eps, self.number(result), output)
        self._keep(weight)

    def _rotate(self, qkv: Tensor, batch: Batch, cache: KVCacheLayer, rotation: Rotation, q: Tensor) -> None:
        self.groups.add(cache.group)
        self.program.rotate_and_store(
            self.number(qkv),
            self._type,
            rotation.heads,
            cache.group,
            *pages_of(cache),
            rotation.cos_sin.data_ptr(),
            rotation.cos_sin.shape[0],
            address(rotation.q_norm),
            address(rotation.k_norm),
            rotation.eps,
            self.number(q),
        )
        self._keep(cache, rotation)

    def _attention(
        self, q: Tensor, batch: Batch, cache: KVCacheLayer, spec: AttentionSpec, out: Tensor, lse: Tensor
    ) -> None:
        self.groups.add(cache.group)
        self.program.attention(
            self.number(q),
            self._type,
            spec.heads,
            cache.group,
            *pages_of(cache),
            spec.scale,
            spec.window or 0,
            spec.softcap or 0.0,
            self.number(out),
            self.number(lse),
        )
        self._keep(cache)
