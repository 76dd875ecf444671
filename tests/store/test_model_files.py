"""Model directories: what is found in them, and what is refused with what words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_samples import LAYERS, write_gguf
from safetensors.numpy import load_file, save_file

from headrace.store import ModelError, open_model, safetensors_index
from headrace.store.gguf_import import convert_gguf


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    directory = base / "tiny"
    directory.mkdir()
    convert_gguf(write_gguf(base / "model.gguf"), directory, {}, lambda done, total: None)
    return directory


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def shard(model: Path) -> list[str]:
    """Cut the weights into two files with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_a_directory_is_described(model: Path) -> None:
    files = open_model(model)
    assert files.name == "tiny" and files.directory == model and files.model_type == "llama"
    assert files.weights == (model / "model.safetensors",)
    assert files.tensors == safetensors_index(files.weights)
    assert files.nbytes == sum(v.nbytes for v in load_file(model / "model.safetensors").values())
    assert files.tokenizer == model / "tokenizer.json" and files.chat_template is None
    assert files.bos_token_id == 0 and open_model(model, name="other").name == "other"


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_multimodal_model_keeps_its_text_part_apart(model: Path, prefix: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = load_file(model / "model.safetensors")
    save_file({k.replace("model.", prefix, 1): v for k, v in tensors.items()}, model / "model.safetensors")
    assert open_model(model).model_type == "gemma3"
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file({k.replace("model.", prefix, 1): v for k, v in tensors.items()}, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"{prefix}layers.1.mlp.up_proj.weight"):
        open_model(model)


def test_shards_are_found_by_their_index_alone(model: Path) -> None:
    names = shard(model)
    save_file({"stray": np.zeros(1)}, model / "stray.safetensors")
    files = open_model(model)
    assert [path.name[:11] for path in files.weights] == ["model-00001", "model-00002"]
    assert sorted(files.tensors) == names


def test_shards_without_an_index_are_taken_together(model: Path) -> None:
    names = shard(model)
    (model / "model.safetensors.index.json").unlink()
    assert sorted(open_model(model).tensors) == names


def test_a_second_copy_beside_the_weights_is_left_alone(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert open_model(model).weights == (model / "model.safetensors",)


def test_end_tokens_are_the_generation_configs_before_the_configs(model: Path) -> None:
    change(model / "generation_config.json", eos_token_id=[5, 6])
    assert open_model(model).eos_token_ids == (5, 6)
    (model / "generation_config.json").unlink()
    change(model / "config.json", eos_token_id=7)
    assert open_model(model).eos_token_ids == (7,)
    change(model / "config.json", eos_token_id=None)
    assert open_model(model).eos_token_ids == ()


def test_chat_templates_are_found_in_their_three_places(model: Path) -> None:
    change(model / "tokenizer_config.json", chat_template="one")
    assert open_model(model).chat_template == "one"
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    change(model / "tokenizer_config.json", chat_template=templates)
    assert open_model(model).chat_template == "two"
    (model / "chat_template.jinja").write_text("three")
    assert open_model(model).chat_template == "three"


def test_the_revision_is_of_the_content(model: Path, tmp_path: Path) -> None:
    revision = open_model(model).revision
    assert open_model(Path(shutil.copytree(model, tmp_path / "copy"))).revision == revision
    change(model / "config.json", rope_theta=1.0)
    assert open_model(model).revision != revision
    before = open_model(model).revision
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    save_file(tensors, model / "model.safetensors")
    assert open_model(model).revision != before


def test_the_revision_sees_any_tensor_that_has_other_values(model: Path) -> None:
    """Two fine-tunes of one base differ in nothing else: names, types, shapes and config are the same."""
    tensors = load_file(model / "model.safetensors")
    found = {open_model(model).revision}
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, model / "model.safetensors")
        found.add(open_model(model).revision)
    assert len(found) == 1 + len(tensors)


def test_the_revision_is_the_same_however_the_weights_are_spread_over_files(model: Path) -> None:
    whole = open_model(model).revision
    shard(model)
    assert open_model(model).revision == whole


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def missing_shard(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def wrong_index(model: Path) -> None:
    shard(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    swapped = dict(zip(index, reversed(index.values()), strict=True))
    change(model / "model.safetensors.index.json", weight_map=swapped)


def missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def cut_weights(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])


def index_outside(model: Path) -> None:
    weight_map = {"model.norm.weight": "../../etc/passwd.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (pickled, r"only pickled weights \(pytorch_model.bin\), which can run code"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"no \*.safetensors"),
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors"),
    "wrong index": (wrong_index, "says that .* but it is not"),
    "index outside": (index_outside, "not a safetensors file beside it"),
    "index without map": (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "missing tensor": (missing_tensor, "1 tensors are missing.*model.layers.1.mlp.up_proj.weight"),
    "more layers": (
        lambda m: change(m / "config.json", num_hidden_layers=LAYERS + 1),
        "9 tensors are missing",
    ),
    "cut weights": (cut_weights, "truncated or corrupt"),
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda m: (m / "config.json").write_text("{,"), "config.json is not JSON"),
    "config not an object": (lambda m: (m / "config.json").write_text("[]"), "JSON object"),
    "binary config": (lambda m: (m / "config.json").write_bytes(b"\xff\x00"), "config.json is not JSON"),
    "architecture": (lambda m: change(m / "config.json", model_type="mamba"), "model_type 'mamba'"),
    "no architecture": (lambda m: change(m / "config.json", model_type=...), "model_type None"),
    "quantised": (
        lambda m: change(m / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised with 'gptq'",
    ),
    "quantised somehow": (
        lambda m: change(m / "config.json", quantization_config="x"),
        "quantised with 'x'",
    ),
    "no kv heads": (lambda m: change(m / "config.json", num_key_value_heads=0), "num_key_value_heads is 0"),
    "layers": (lambda m: change(m / "config.json", num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "end tokens": (lambda m: change(m / "generation_config.json", eos_token_id=["x"]), "eos_token_id is"),
    "generation config": (lambda m: (m / "generation_config.json").write_text("x"), "generation_config.json"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer.json"),
    "template": (lambda m: (m / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja"),
    "no directory": (shutil.rmtree, "not a directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_broken_is_refused_by_name(case: str, model: Path) -> None:
    damage, message = REFUSED[case]
    damage(model)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(model)
    assert "tiny" in str(caught.value)
