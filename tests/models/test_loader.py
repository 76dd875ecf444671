"""From a directory to a decoder: which tensors are asked for, what is refused, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.kernels.reference import TorchKernels
from headrace.models import KVGroup, UnsupportedModelError, kv_groups, load_decoder, read_config
from headrace.models.families import WeightNames
from headrace.models.loader import layer_parts
from headrace.models.weights import Checkpoint, Shard, WeightsError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
KERNELS = TorchKernels(dtype=torch.float32)


def _tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (20, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (20, 16),
    }
    for layer in range(2):
        for name, shape in {
            "input_layernorm.weight": (16,),
            "post_attention_layernorm.weight": (16,),
            "self_attn.q_proj.weight": (16, 16),
            "self_attn.q_proj.bias": (16,),
            "self_attn.k_proj.weight": (8, 16),
            "self_attn.k_proj.bias": (8,),
            "self_attn.v_proj.weight": (8, 16),
            "self_attn.v_proj.bias": (8,),
            "self_attn.o_proj.weight": (16, 16),
            "self_attn.o_proj.bias": (16,),
            "mlp.gate_proj.weight": (24, 16),
            "mlp.up_proj.weight": (24, 16),
            "mlp.down_proj.weight": (16, 24),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    _write(tmp_path, CONFIG, _tensors())
    return tmp_path


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def test_every_tensor_has_its_place(directory: Path) -> None:
    decoder = load_decoder(directory, KERNELS, 64)
    assert decoder.config == read_config(CONFIG)
    assert decoder.max_model_len == 64


def test_tensors_that_do_not_fit_are_refused(directory: Path) -> None:
    tensors = _tensors()
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(23, 16)
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # older files have it
    _write(directory, CONFIG, tensors)
    with pytest.raises(WeightsError) as error:
        load_decoder(directory, KERNELS, 64)
    assert str(error.value).splitlines()[1:] == [
        "  model.layers.1.self_attn.k_proj.bias [8] is missing",
        "  model.layers.1.mlp.up_proj.weight is [23, 16], but config.json makes it [24, 16]",
        "  model.layers.2.input_layernorm.weight [16] has no place in this model",
    ]


def test_biases_that_the_config_does_not_have_are_refused(directory: Path) -> None:
    _write(directory, {**CONFIG, "attention_bias": False}, _tensors())
    with pytest.raises(WeightsError, match=r"q_proj\.bias \[16\] has no place"):
        load_decoder(directory, KERNELS, 64)


def test_tied_embeddings_need_no_head_and_take_no_other(directory: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = _tensors()
    _write(directory, tied, tensors)
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_decoder(directory, KERNELS, 64)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    _write(directory, tied, tensors)
    same = load_decoder(directory, KERNELS, 64)
    del tensors["lm_head.weight"]
    _write(directory, tied, tensors)
    none = load_decoder(directory, KERNELS, 64)
    hidden = torch.randn(3, 16)
    assert torch.equal(same.logits(hidden), none.logits(hidden))


def test_names_of_another_form_are_refused(directory: Path) -> None:
    _write(directory, CONFIG, {f"transformer.{name}": tensor for name, tensor in _tensors().items()})
    with pytest.raises(WeightsError, match=r"no tensor's name begins with model\."):
        load_decoder(directory, KERNELS, 64)


@pytest.mark.parametrize("length", [0, 65])
def test_lengths_beyond_the_positions_are_refused(directory: Path, length: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"max_model_len is {length}; .* from 1 to 64"):
        load_decoder(directory, KERNELS, length)


def test_kv_groups_that_miss_a_layer_are_refused(directory: Path) -> None:
    decoder = load_decoder(directory, KERNELS, 64)
    pages = KERNELS.allocate_kv(4, 1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"KV groups hold layers \[1\]; the model has 0 to 1"):
        decoder.attach_kv(pages, [KVGroup(None, (1,))], 16)
    decoder.attach_kv(pages, kv_groups(decoder.config), 16)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_of_a_layer_add_up_to_the_layer(directory: Path, world: int) -> None:
    """Each rank computes its heads and feed-forward columns from its own slices; the outputs add up."""
    parts = layer_parts(read_config(CONFIG), WeightNames(), "model.layers.0.")
    tensors = load_file(directory / "model.safetensors")
    whole = {name.removeprefix("model.layers.0."): tensor for name, tensor in tensors.items()}
    x = torch.randn(5, 16)
    total = torch.zeros(5, 16)
    with Checkpoint(directory) as checkpoint:
        for rank in range(world):
            shard = Shard(rank, world)
            qkv = checkpoint.load(parts.qkv.weights, shard, torch.float32)
            bias = checkpoint.load(parts.qkv.biases, shard, torch.float32)
            heads, kv_heads = 4 // world, max(1, 2 // world)
            q, k, v = torch.split(x @ qkv.T + bias, [heads * 4, kv_heads * 4, kv_heads * 4], 1)
            first = rank * heads
            assert torch.allclose(q, _project(whole, "q", x)[:, first * 4 : (first + heads) * 4], atol=1e-6)
            first_kv = first * 2 // 4
            for found, name in ((k, "k"), (v, "v")):
                expected = _project(whole, name, x)[:, first_kv * 4 : (first_kv + kv_heads) * 4]
                assert torch.allclose(found, expected, atol=1e-6)
            output = checkpoint.load(parts.output.weights, shard, torch.float32)
            output_bias = checkpoint.load(parts.output.biases, shard, torch.float32)
            total += q @ output.T
            if len(output_bias):
                total += output_bias
            gate_up = checkpoint.load(parts.gate_up.weights, shard, torch.float32)
            gate, up = (x @ gate_up.T).chunk(2, -1)
            total += (gate * up) @ checkpoint.load(parts.down.weights, shard, torch.float32).T
    expected = _project(whole, "q", x) @ whole["self_attn.o_proj.weight"].T + whole["self_attn.o_proj.bias"]
    gated = (x @ whole["mlp.gate_proj.weight"].T) * (x @ whole["mlp.up_proj.weight"].T)
    expected += gated @ whole["mlp.down_proj.weight"].T
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def _project(whole: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ whole[f"self_attn.{name}_proj.weight"].T + whole[f"self_attn.{name}_proj.bias"]


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from headrace.kernels.reference import TorchKernels
from headrace.models import load_decoder

def anonymous_bytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

kernels = TorchKernels(dtype=torch.float32, threads=1)
load_decoder(Path(sys.argv[1]), kernels, 64)
import threading
peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.001):
        peak[0] = max(peak[0], anonymous_bytes("RssAnon"))
before = anonymous_bytes("RssAnon")
thread = threading.Thread(target=watch); thread.start()
decoder = load_decoder(Path(sys.argv[2]), kernels, 64)
stop.set(); thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_loading_peaks_near_the_size_of_the_weights(directory: Path, tmp_path: Path) -> None:
    """8 layers of 12 MB: the peak may pass the 100 MB of weights by two layers, not by the file."""
    config = {**CONFIG, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    config |= {"attention_bias": False, "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": torch.zeros(20, 512), "model.norm.weight": torch.zeros(512)}
    for layer in range(8):
        for name, shape in {
            "input_layernorm": (512,),
            "post_attention_layernorm": (512,),
            "self_attn.q_proj": (512, 512),
            "self_attn.k_proj": (256, 512),
            "self_attn.v_proj": (256, 512),
            "self_attn.o_proj": (512, 512),
            "mlp.gate_proj": (1536, 512),
            "mlp.up_proj": (1536, 512),
            "mlp.down_proj": (512, 1536),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape)
    large = tmp_path / "large"
    large.mkdir()
    _write(large, config, tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, directory, large],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    peak = int(done.stdout)
    assert 0.9 * size < peak < 1.25 * size, f"peak {peak / size:.2f} of the weights"
