"""Safetensors files: checking what is in them, and writing new ones as a stream.

`safetensors_index` reads the headers only and refuses a file whose header does not describe exactly the bytes
it has, so that a loader may map a tensor's range without looking again. `content_digest` tells contents apart
by samples of them. `write_safetensors` takes tensors one at a time and never holds more than one chunk.
Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from .errors import ModelFileError

MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the format's reference reader."""

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip

_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 4096
"""Of each tensor, `content_digest` sees so many pieces of this size."""

_ALIGNMENT: Final = 64
_INDEX_FILE: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes `[begin, end)` of `path`, counted from the start of the file, row-major,
    little-endian. `dtype` is the format's own word, such as "F32" or "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its description now, its bytes from `chunks` when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def safetensors_index(files: Sequence[Path]) -> dict[str, TensorEntry]:
    """Every tensor of `files` by name. Raises `ModelFileError` for a header that is cut off, is not JSON,
    names an unknown dtype, or whose ranges overlap, leave gaps or miss the end of the file, and for a name in
    two files."""
    index: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in _read_entries(path):
            if name in index:
                raise ModelFileError(f"tensor {name!r} is both in {index[name].path} and in {path.name}")
            index[name] = entry
    return index


def content_digest(tensors: Mapping[str, TensorEntry]) -> bytes:
    """16 bytes that name what `tensors` hold, however they are spread over files: names, types, shapes, and
    of each tensor its first and last 4 KiB and six pieces evenly between.

    It does not see a change that is confined to bytes between those pieces. Reads 32 KiB a tensor. Raises
    `ModelFileError` for a file that cannot be read or became shorter.
    """
    digest = hashlib.blake2b(digest_size=16)
    with contextlib.ExitStack() as opened:
        files = {
            path: opened.enter_context(_open(path)) for path in {entry.path for entry in tensors.values()}
        }
        for name, entry in sorted(tensors.items()):
            header = json.dumps([name, entry.dtype, entry.shape]).encode()
            digest.update(len(header).to_bytes(8, "little") + header)
            for begin, size in _samples(entry):
                digest.update(_read_piece(files[entry.path], entry.path, begin, size))
    return digest.digest()


def _samples(entry: TensorEntry) -> list[tuple[int, int]]:
    """Where the pieces of a tensor begin in its file, and their sizes; a small tensor is one piece."""
    size = entry.end - entry.begin
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [(entry.begin, size)]
    last = size - _SAMPLE_BYTES
    return [(entry.begin + last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]


def _read_piece(file: BinaryIO, path: Path, begin: int, size: int) -> bytes:
    try:
        piece = os.pread(file.fileno(), size, begin)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    if len(piece) < size:
        raise ModelFileError(f"{path} became shorter while it was read")
    return piece


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error


def _header_bytes(path: Path) -> bytes:
    """The raw JSON header of a safetensors file. Raises `ModelFileError` when it is cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelFileError(
                    f"{path} is truncated: it has {size} bytes, the header's length alone takes 8"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelFileError(
                    f"{path} is truncated or corrupt: its header claims {length} bytes, "
                    f"the file has {size} and the limit is {MAX_HEADER_BYTES}"
                )
            return file.read(length)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error


def _read_entries(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    raw = _header_bytes(path)
    base = 8 + len(raw)
    data_bytes = path.stat().st_size - base
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is corrupt: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path} is corrupt: its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = [(name, _entry(path, base, data_bytes, name, fields)) for name, fields in header.items()]
    at = base
    for name, entry in sorted(entries, key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise ModelFileError(
                f"{path} is corrupt: tensor {name!r} begins at byte {entry.begin}, "
                f"the one before it ends at {at}"
            )
        at = entry.end
    if at != base + data_bytes:
        raise ModelFileError(
            f"{path} is corrupt: its tensors end at byte {at}, the file at {base + data_bytes}"
        )
    yield from entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _entry(path: Path, base: int, data_bytes: int, name: str, fields: object) -> TensorEntry:
    try:
        if not isinstance(fields, dict):
            raise ValueError("its entry is not an object")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if dtype not in DTYPE_BITS:
            raise ValueError(f"unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"its shape is {shape!r}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise ValueError(f"its data_offsets are {offsets!r}")
        begin, end = offsets
        if not 0 <= begin <= end <= data_bytes:
            raise ValueError(f"its range {begin}..{end} lies outside the file's {data_bytes} bytes of data")
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != (end - begin) * 8:
            raise ValueError(f"{dtype} of shape {shape} takes {bits // 8} bytes, its range has {end - begin}")
    except KeyError as error:
        raise ModelFileError(f"{path} is corrupt: tensor {name!r} has no {error.args[0]!r}") from None
    except ValueError as error:
        raise ModelFileError(f"{path} is truncated or corrupt: tensor {name!r}: {error}") from None
    return TensorEntry(path, dtype, tuple(shape), base + begin, base + end)


def write_safetensors(
    directory: Path,
    tensors: Sequence[TensorSpec],
    *,
    max_shard_bytes: int,
    wrote: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Write `tensors` into `directory` as `model.safetensors`, or as numbered shards of at most
    `max_shard_bytes` with their index. `wrote` hears the size of each chunk. Returns the files, in order."""
    shards = _shards(tensors, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    paths = [directory / name for name in names]
    for path, shard in zip(paths, shards, strict=True):
        _write_file(path, shard, wrote)
    if len(shards) > 1:
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _shards(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[TensorSpec], wrote: Callable[[int], None]) -> None:
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for tensor in tensors:
            left = tensor.nbytes
            for chunk in tensor.chunks():
                file.write(chunk)
                nbytes = memoryview(chunk).nbytes
                left -= nbytes
                wrote(nbytes)
            if left:
                raise ModelFileError(f"{path}: tensor {tensor.name!r} came {left} bytes short of its shape")
