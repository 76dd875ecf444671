"""Safetensors headers: what is indexed agrees with the format's own library, broken ones are refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from headrace.store import ModelFileError, safetensors_index
from headrace.store.safetensors_file import TensorSpec, content_digest, write_safetensors


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5, dtype=np.float16),
        "c": np.zeros((2, 0), dtype=np.int64),
        "d": np.array(7, dtype=np.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    return tmp_path / "model.safetensors"


def test_ranges_hold_the_tensors(sample: Path) -> None:
    index = safetensors_index([sample])
    content = sample.read_bytes()
    for name, values in load_file(sample).items():
        entry = index[name]
        assert entry.shape == values.shape and entry.path == sample
        assert content[entry.begin : entry.end] == values.tobytes()
    assert index["a"].dtype == "F32" and index["b"].dtype == "F16"


def digest(path: Path, **tensors: Any) -> bytes:
    save_file(tensors, path)
    return content_digest(safetensors_index([path]))


def test_a_digest_sees_both_ends_of_a_large_tensor_and_pieces_between(tmp_path: Path) -> None:
    size = 100_000
    path = tmp_path / "model.safetensors"
    before = digest(path, w=np.zeros(size, dtype=np.uint8))
    seen = []
    for at in (0, 4095, 7 * 4096, size // 2, size - 4096, size - 1):
        changed = np.zeros(size, dtype=np.uint8)
        changed[at] = 1
        seen.append(digest(path, w=changed) != before)
    # Eight pieces begin 13,700 bytes apart: half of it lies between the fourth and the fifth.
    assert seen == [True, True, True, False, True, True]


def test_a_digest_sees_names_types_and_shapes_but_not_places(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ones = np.ones((2, 3), dtype=np.float32)
    alone = digest(path, a=ones)
    assert digest(path, a=ones) == alone
    others = {"b": ones}, {"a": ones.T.copy()}, {"a": ones.view(np.int32)}, {"a": ones, "b": ones[:0]}
    assert len({alone, *(digest(path, **other) for other in others)}) == 5
    index = safetensors_index([path])
    assert content_digest({"a": index["a"]}) == alone


def test_a_file_that_became_shorter_is_told(sample: Path) -> None:
    index = safetensors_index([sample])
    sample.write_bytes(sample.read_bytes()[:-20])
    with pytest.raises(ModelFileError, match="became shorter"):
        content_digest(index)
    sample.unlink()
    with pytest.raises(ModelFileError, match="cannot read"):
        content_digest(index)


def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    values = {f"t{i}": np.arange(i * 10, dtype=np.float32) for i in range(1, 6)}
    specs = [
        TensorSpec(name, "F32", v.shape, lambda v=v: [v[:3].tobytes(), v[3:].tobytes()])
        for name, v in values.items()
    ]
    paths = write_safetensors(tmp_path, specs, max_shard_bytes=200)
    assert [path.name for path in paths] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    read = {name: v for path in paths for name, v in load_file(path).items()}
    assert all(np.array_equal(read[name], v) for name, v in values.items()) and len(read) == 5
    for entry in safetensors_index(paths).values():
        assert entry.begin % 4 == 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())


def test_a_tensor_that_comes_short_is_not_passed_off_as_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="4 bytes short"):
        write_safetensors(tmp_path, [TensorSpec("t", "F32", (2,), lambda: [b"1234"])], max_shard_bytes=100)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"same": np.zeros(2)}, tmp_path / name)
    with pytest.raises(ModelFileError, match=r"'same' is both in .*x\.safetensors and in y\.safetensors"):
        safetensors_index([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header: Any, data: bytes = bytes(8)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: it has 0 bytes"),
        (b"1234567", "truncated: it has 7 bytes"),
        (struct.pack("<Q", 1 << 50) + b"{}", "header claims 1125899906842624 bytes"),
        (struct.pack("<Q", 100) + b"{}", "header claims 100 bytes"),
        (raw_file(b"nonsense"), "not JSON"),
        (raw_file(b"\xff\xfe{}"), "not JSON"),
        (raw_file(b"[" * 100_000), "not JSON"),
        (raw_file([]), "not a JSON object"),
        (raw_file(b'{"t": 1, "t": 2}'), "occurs twice"),
        (raw_file({"t": 5}), "not an object"),
        (raw_file({"t": {"dtype": "F32", "shape": [2]}}), "no 'data_offsets'"),
        (raw_file({"t": entry(dtype="F31")}), "unknown dtype 'F31'"),
        (raw_file({"t": entry(shape=[-2])}), r"shape is \[-2\]"),
        (raw_file({"t": entry(shape=[2.0])}), r"shape is \[2.0\]"),
        (raw_file({"t": entry(end=16, shape=[4])}), "outside the file's 8 bytes"),
        (raw_file({"t": entry(begin=8, end=0)}), "range 8..0"),
        (raw_file({"t": entry(shape=[3])}), "takes 12 bytes, its range has 8"),
        (raw_file({"t": entry(begin=4, end=8, shape=[1])}), "begins at byte"),
        (raw_file({"t": entry(end=4, shape=[1])}), "tensors end at byte"),
        (raw_file({"t": entry(), "u": entry()}), "begins at byte"),
    ],
)
def test_broken_headers_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        safetensors_index([path])
    assert path.name in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_cut_is_noticed(sample: Path, data: st.DataObject) -> None:
    whole = sample.read_bytes()
    cut = sample.with_name("cut.safetensors")
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelFileError):
        safetensors_index([cut])
