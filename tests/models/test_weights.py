"""Safetensors by slices: cuts for ranks, checks by name and shape, forms of a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.models.weights import WHOLE, Checkpoint, Part, Shard, WeightsError

TENSORS = {
    "q": torch.arange(6 * 4.0).view(6, 4),
    "k": torch.arange(100, 100 + 2 * 4.0).view(2, 4),
    "o": torch.arange(4 * 6.0).view(4, 6),
    "bias": torch.arange(6.0),
    "head": torch.arange(7 * 4.0).view(7, 4),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def _load(directory: Path, part: Part, shard: Shard) -> torch.Tensor:
    with Checkpoint(directory) as checkpoint:
        return checkpoint.load([part], shard, torch.float32)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_hold_the_whole_between_them(directory: Path, world: int) -> None:
    shards = [Shard(rank, world) for rank in range(world)]
    for part, dimension in [
        (Part("q", (6, 4), "rows", 6), 0),
        (Part("bias", (6,), "rows", 6), 0),
        (Part("o", (4, 6), "columns", 6), 1),
        (Part("head", (7, 4), "vocabulary"), 0),
        (Part("bias", (6,), "first"), 0),
    ]:
        slices = [_load(directory, part, shard) for shard in shards]
        assert torch.equal(torch.cat(slices, dimension), TENSORS[part.name])
        assert [tuple(each.shape) for each in slices] == [part.local_shape(shard) for shard in shards]


def test_cuts_go_between_units(directory: Path) -> None:
    """Three heads of two rows on three ranks."""
    part = Part("q", (6, 4), "rows", 3)
    assert torch.equal(_load(directory, part, Shard(1, 3)), TENSORS["q"][2:4])


def test_few_key_heads_are_repeated_on_neighbouring_ranks(directory: Path) -> None:
    part = Part("k", (2, 4), "rows", 2)
    rows = [_load(directory, part, Shard(rank, 4)) for rank in range(4)]
    assert [row.tolist() for row in rows] == [TENSORS["k"][[rank // 2]].tolist() for rank in range(4)]


def test_a_cut_through_a_unit_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"q \[6, 4\] has 3 units along dimension 0, which 2 ranks"):
        Part("q", (6, 4), "rows", 3).span(Shard(0, 2))
    with pytest.raises(ValueError, match="rank 2 is outside of a world of 2"):
        Shard(2, 2)


def test_fused_parts_lie_one_below_the_other_and_are_converted(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        parts = [Part("q", (6, 4), "rows", 6), Part("k", (2, 4), "rows", 2)]
        fused = checkpoint.load(parts, Shard(1, 2), torch.bfloat16)
    assert torch.equal(fused, torch.cat((TENSORS["q"][3:], TENSORS["k"][1:])).to(torch.bfloat16))


def test_what_was_loaded_does_not_need_the_file(directory: Path) -> None:
    loaded = _load(directory, Part("q", (6, 4)), WHOLE)
    save_file({"other": torch.zeros(1000)}, directory / "model.safetensors")
    assert torch.equal(loaded, TENSORS["q"])


def test_every_problem_is_named_with_both_shapes(directory: Path) -> None:
    save_file({**TENSORS, "whole": torch.arange(3), "inv": torch.zeros(2)}, directory / "model.safetensors")
    parts = [Part("q", (6, 5)), Part("k", (2, 4)), Part("gone", (1,)), Part("whole", (3,))]
    parts += [Part("bias", (6,)), Part("head", (7, 4))]
    with Checkpoint(directory) as checkpoint, pytest.raises(WeightsError) as error:
        checkpoint.check(parts, ignored=["inv"])
    assert str(error.value).splitlines()[1:] == [
        "  q is [6, 4], but config.json makes it [6, 5]",
        "  gone [1] is missing",
        "  whole is stored as I64; supported: BF16, F16, F32",
        "  o [4, 6] has no place in this model",
    ]


def test_many_problems_are_counted_not_listed(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint, pytest.raises(WeightsError, match="and 17 more"):
        checkpoint.check([Part(f"gone {index}", (1,)) for index in range(20)])


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    save_file({"q": TENSORS["q"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"k": TENSORS["k"]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"q": torch.zeros(6, 4)}, tmp_path / "adapter.safetensors")
    index = {"weight_map": {"q": "model-00001-of-00002.safetensors", "k": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names) == {"q", "k"}
        assert torch.equal(checkpoint.load([Part("q", (6, 4))], WHOLE, torch.float32), TENSORS["q"])


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    expected = "holds no" if content is None else r"model\.safetensors cannot be read"
    with pytest.raises(WeightsError, match=expected):
        Checkpoint(tmp_path)
