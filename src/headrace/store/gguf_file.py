"""Reading a GGUF file: its metadata, its table of tensors, and the raw bytes of each.

In: a path. Out: a `GGUFFile` in which every length, type and offset was checked against the file's size, so
later code may trust it. Knows the container only; what the keys and tensors mean is for `gguf_config`,
`gguf_tokenizer` and `gguf_import`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from .errors import ModelFileError, UnsupportedModelError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_ENTRIES: Final = 1 << 20
"""Bound on metadata keys and on tensors; the largest published models have some thousands."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One row of the tensor table. `shape` is outermost dimension first, as numpy has it."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file. `header_digest` is a BLAKE2b of everything before the tensor data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    header_digest: str
    _bytes: mmap.mmap

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """Raw bytes of a tensor, `[rows, bytes per row]`; a vector has one row. A view of the file's
        mapping."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        flat = np.frombuffer(self._bytes, dtype=np.uint8, count=tensor.nbytes, offset=tensor.begin)
        return flat.reshape(rows, tensor.nbytes // rows)


def open_gguf(path: Path) -> GGUFFile:
    """Map `path` and check it. Raises `ModelFileError` for what is not a whole GGUF file, and
    `UnsupportedModelError` for a version, byte order or tensor type that is not read."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise ModelFileError(f"{path} is not a GGUF file: it has {size} bytes, a header alone has 24")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    return _Parser(path, mapped).parse()


class _Parser:
    """A cursor over the mapped file that refuses to step past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def parse(self) -> GGUFFile:
        if self._data[:4] != MAGIC:
            raise ModelFileError(
                f"{self._path} is not a GGUF file: it starts with {bytes(self._data[:4])!r}, not {MAGIC!r}"
            )
        self._at = 4
        (version,) = self._take("I", "version")
        if version not in VERSIONS:
            # A big-endian file shows its small version number in the upper bytes.
            order = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(
                f"{self._path} is GGUF version {version}{order}; versions 2 and 3 are read"
            )
        tensor_count, key_count = self._take("QQ", "counts")
        for what, count in (("tensors", tensor_count), ("metadata keys", key_count)):
            if count > MAX_ENTRIES:
                raise ModelFileError(
                    f"{self._path} is corrupt: it claims {count} {what}, the limit is {MAX_ENTRIES}"
                )

        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string("metadata key")
            if key in metadata:
                raise ModelFileError(f"{self._path} is corrupt: metadata key {key!r} occurs twice")
            (kind,) = self._take("I", key)
            metadata[key] = self._value(kind, key)

        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ModelFileError(f"{self._path}: general.alignment is {alignment!r}, not a power of two")
        table = [self._tensor_entry() for _ in range(tensor_count)]
        digest = hashlib.blake2b(memoryview(self._data)[: self._at], digest_size=16).hexdigest()
        data_begin = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for entry in table:
            if entry[0] in tensors:
                raise ModelFileError(f"{self._path} is corrupt: tensor {entry[0]!r} occurs twice")
            tensors[entry[0]] = self._tensor(*entry, data_begin)
        return GGUFFile(self._path, metadata, tensors, digest, self._data)

    def _take(self, layout: str, what: str) -> tuple[Any, ...]:
        fields = struct.Struct("<" + layout)
        self._need(fields.size, what)
        values = fields.unpack_from(self._data, self._at)
        self._at += fields.size
        return values

    def _need(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise ModelFileError(
                f"{self._path} is truncated or corrupt: {what!r} needs {count} bytes at offset {self._at}, "
                f"the file has {self._size}"
            )

    def _string(self, what: str) -> str:
        (length,) = self._take("Q", what)
        self._need(length, what)
        raw = self._data[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self._path} is corrupt: {what} is not UTF-8: {error}") from error

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            (value,) = self._take(_SCALARS[kind], key)
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise ModelFileError(f"{self._path} is corrupt: metadata key {key!r} has the unknown type {kind}")
        element, count = self._take("IQ", key)
        if element == _STRING:
            self._need(count * 8, key)
            return [self._string(key) for _ in range(count)]
        if element not in _SCALARS:
            raise ModelFileError(
                f"{self._path}: metadata key {key!r} is an array of type {element}, which is not read"
            )
        self._need(count * struct.calcsize("<" + _SCALARS[element]), key)
        values = list(self._take(f"{count}{_SCALARS[element]}", key))
        return [bool(value) for value in values] if element == _BOOL else values

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("tensor name")
        (dimensions,) = self._take("I", name)
        if not 1 <= dimensions <= 4:
            raise ModelFileError(
                f"{self._path} is corrupt: tensor {name!r} has {dimensions} dimensions, 1 to 4 exist"
            )
        shape = self._take(f"{dimensions}Q", name)
        kind, offset = self._take("IQ", name)
        return name, tuple(reversed(shape)), kind, offset

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data_begin: int
    ) -> GGUFTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(
                f"{self._path}: tensor {name!r} has the unknown type {kind}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if 0 in shape or shape[-1] % block:
            raise ModelFileError(
                f"{self._path} is corrupt: tensor {name!r} has shape {list(shape)}, "
                f"{quantization.name} needs whole rows of {block} values"
            )
        nbytes = math.prod(shape) // block * block_bytes
        begin = data_begin + offset
        if begin + nbytes > self._size:
            raise ModelFileError(
                f"{self._path} is truncated: tensor {name!r} ends at byte {begin + nbytes}, "
                f"the file has {self._size}"
            )
        return GGUFTensor(name, shape, quantization, begin, nbytes)
