"""The GGUF container: what is read, and that no broken file is taken for a whole one."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
from gguf_samples import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.store import ModelError, ModelFileError, UnsupportedModelError
from headrace.store.gguf_file import open_gguf


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {"x.list": [1.5, 2.5], "x.flag": True, "x.words": ["a", "", "é"], "x.negative": 3}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "qwen2", Q.Q8_0, metadata=metadata)


def test_metadata_and_bytes_are_those_that_the_gguf_package_reads(sample: Path) -> None:
    ours, theirs = open_gguf(sample), GGUFReader(sample)
    expected = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == expected
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        raw = np.frombuffer(tensor.data.tobytes(), np.uint8)
        assert np.array_equal(ours.rows(tensor.name).ravel(), raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"GGML" + bytes(40), "starts with b'GGML'"),
        (b"PK\x03\x04" + bytes(40), "not b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "claims 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "'metadata key' needs 4611686018427387904 bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60), "'k' needs"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "array of type 9"),
        (b"GGUF" + struct.pack("<IQQ" + "Q1sIB" * 2, 3, 0, 2, 1, b"k", 0, 1, 1, b"k", 0, 1), "twice"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQ", 3, 1, 0, 1, b"t", 1, 8, 0), "'t' needs"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 0, 0), "ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 8, 0), "whole rows of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0), "unknown type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 77), "77 dimensions"),
    ],
)  # fmt: skip
def test_broken_containers_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_cut_is_noticed(sample: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = sample.read_bytes()
    header = min(tensor.begin for tensor in open_gguf(sample).tensors.values())
    length = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 33))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:length])
    with pytest.raises(ModelFileError):
        open_gguf(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_to_the_header_never_passes_for_another_error(
    sample: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """It may leave a valid file or raise a `ModelError`, nothing else; tensors stay inside the file."""
    content = bytearray(sample.read_bytes())
    header = min(tensor.begin for tensor in open_gguf(sample).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        file = open_gguf(damaged)
    except (ModelFileError, UnsupportedModelError):
        return
    for name, tensor in file.tensors.items():
        assert file.rows(name).size == tensor.nbytes
