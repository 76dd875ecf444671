"""GGUF files turned into model directories, held against transformers' reading of the same files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf_samples import HEAD_DIM, HEADS, HIDDEN, LAYERS, WORDS, write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.gguf.kernels import dequantize_blocks
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from headrace.store import ModelError, UnsupportedModelError, gguf_weights, open_model
from headrace.store.gguf_config import llama3_divisors
from headrace.store.gguf_file import open_gguf
from headrace.store.gguf_import import convert_gguf
from headrace.store.gguf_tokenizer import tokenizer_of


def convert(source: Path, directory: Path) -> Path:
    directory.mkdir()
    convert_gguf(source, directory, {}, lambda done, total: None)
    return directory


def config_of(source: Path, directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((convert(source, directory) / "config.json").read_text())
    return config


def transformers_reading(source: Path) -> tuple[dict[str, torch.Tensor], Any]:
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"], config


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_and_config_are_those_that_transformers_reads(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "model.gguf", architecture, Q.Q8_0, tied=tied)
    directory = convert(source, tmp_path / "out")
    expected, expected_config = transformers_reading(source)
    tensors = load_file(directory / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, values in tensors.items():
        assert torch.equal(values, expected[name].reshape(values.shape)), name

    config = AutoConfig.from_pretrained(directory).to_dict()
    for key in (
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "rms_norm_eps",
        "unk_token_id",
    ):
        config.pop(key, None)
    # transformers overlooks the head size where these files state it, and Gemma's scale that follows from it.
    assert config.pop("head_dim", HEAD_DIM) == HEAD_DIM
    assert config.pop("query_pre_attn_scalar", HEAD_DIM) == HEAD_DIM
    differing = {key: value for key, value in config.items() if value != expected_config.to_dict().get(key)}
    assert differing == {}
    assert AutoConfig.from_pretrained(directory).rms_norm_eps == 1e-5

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.tie_word_embeddings is tied
    assert open_model(directory).eos_token_ids == (len(WORDS),)


def test_rotary_halves_are_put_back_as_they_were(tmp_path: Path) -> None:
    """The conversion to GGUF, written out here: published [head, half, i] becomes [head, i, half]."""
    published = np.random.default_rng(1).normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    stored = published.reshape(HEADS, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(published.shape)
    source = write_gguf(tmp_path / "model.gguf", extra={"blk.0.attn_q.weight": stored})
    tensors = load_file(convert(source, tmp_path / "out") / "model.safetensors")
    assert np.array_equal(tensors["model.layers.0.self_attn.q_proj.weight"].numpy(), published)


def test_one_is_taken_off_gemma_norms(tmp_path: Path) -> None:
    published = np.linspace(-0.5, 0.5, HIDDEN, dtype=np.float32)
    extra = {"output_norm.weight": published + np.float32(1)}
    source = write_gguf(tmp_path / "model.gguf", "gemma3", extra=extra)
    tensors = load_file(convert(source, tmp_path / "out") / "model.safetensors")
    assert np.allclose(tensors["model.norm.weight"].numpy(), published, atol=1e-7)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_formats_are_dequantised_as_by_transformers_own_kernels(kind: Q, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", "qwen2", kind)
    entry = open_model(convert(source, tmp_path / "out")).tensors["model.layers.1.mlp.down_proj.weight"]
    assert entry.dtype == "F32"
    expected = dequantised(open_gguf(source).rows("blk.1.ffn_down.weight"), kind, entry.shape)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(tensors["model.layers.1.mlp.down_proj.weight"].numpy(), expected)


def dequantised(rows: npt.NDArray[np.uint8], kind: Q, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """By transformers' kernels; they lack Q5_0, which is written out here as ggml's header describes it."""
    if kind != Q.Q5_0:
        raw = torch.from_numpy(rows.copy())
        return np.asarray(dequantize_blocks(raw, int(kind), shape[0], shape[1], torch.float32).numpy())
    blocks = rows.reshape(-1, 22)  # half scale, 32 high bits, 16 bytes of two low parts each
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little").astype(np.int32)
    low = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1).astype(np.int32)
    return (scale * ((low | high << 4) - 16).astype(np.float32)).reshape(shape)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [(Q.F16, "float16", "F16"), (Q.BF16, "bfloat16", "BF16"), (Q.F32, "float32", "F32")],
)
def test_unquantised_matrices_stay_as_they_are(kind: Q, dtype: str, stored: str, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", "llama", kind)
    model = open_model(convert(source, tmp_path / "out"))
    assert model.config["torch_dtype"] == dtype
    entry = model.tensors["model.layers.0.mlp.up_proj.weight"]
    assert entry.dtype == stored
    written = entry.path.read_bytes()[entry.begin : entry.end]
    assert written == open_gguf(source).rows("blk.0.ffn_up.weight").tobytes()
    assert model.tensors["model.norm.weight"].dtype == "F32"


def test_chunks_and_shards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", "llama", Q.Q4_1)
    whole = load_file(convert(source, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(gguf_weights, "CHUNK_VALUES", 3 * HIDDEN)
    monkeypatch.setattr(gguf_weights, "MAX_SHARD_BYTES", 700_000)
    model = open_model(convert(source, tmp_path / "parts"))
    assert len(model.weights) > 3
    index = json.loads((model.directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry.path.name for name, entry in model.tensors.items()}
    parts = {name: values for path in model.weights for name, values in load_file(path).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_progress_ends_at_the_size_of_the_weights(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf")
    heard: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    convert_gguf(source, tmp_path / "out", {}, lambda done, total: heard.append((done, total)))
    assert heard[0][0] == 0 and heard[-1][0] == heard[-1][1] == open_model(tmp_path / "out").nbytes
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_mistral_is_told_by_name_or_window(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", metadata={"general.name": "Mistral 7B v0.3"})
    config = config_of(source, tmp_path / "a")
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    source = write_gguf(tmp_path / "b.gguf", metadata={"llama.attention.sliding_window": 4096})
    config = config_of(source, tmp_path / "b")
    assert config["model_type"] == "mistral" and config["sliding_window"] == 4096
    assert AutoConfig.from_pretrained(tmp_path / "a").sliding_window is None


def test_gemma_layers_alternate_and_have_two_rotary_bases(tmp_path: Path) -> None:
    keys = {
        "gemma3.block_count": LAYERS,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    config_of(write_gguf(tmp_path / "model.gguf", "gemma3", metadata=keys), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.layer_types == ["sliding_attention"] * LAYERS
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["full_attention"]["rope_theta"] == 50_000.0


def test_yarn_and_linear_scaling_are_carried_over(tmp_path: Path) -> None:
    keys = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 256,
    }
    config = config_of(write_gguf(tmp_path / "a.gguf", "qwen2", metadata=keys), tmp_path / "a")
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = config_of(write_gguf(tmp_path / "b.gguf", metadata=keys), tmp_path / "b")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_the_divisors(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors = published_llama3_divisors(500_000.0, scaling)
    assert np.allclose(llama3_divisors(500_000.0, HEAD_DIM, scaling), divisors)
    theta = {"llama.rope.freq_base": 500_000.0}
    source = write_gguf(tmp_path / "a.gguf", metadata=theta, extra={"rope_freqs.weight": divisors})
    assert config_of(source, tmp_path / "a")["rope_scaling"] == scaling
    changed = divisors.copy()
    changed[HEAD_DIM // 4] *= 1.5
    source = write_gguf(tmp_path / "b.gguf", metadata=theta, extra={"rope_freqs.weight": changed})
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        config_of(source, tmp_path / "b")


def published_llama3_divisors(theta: float, scaling: dict[str, Any]) -> npt.NDArray[np.float32]:
    """From the frequencies of transformers' own implementation."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS, "head_dim": HEAD_DIM}
    config = LlamaConfig(
        **shape, rope_theta=theta, rope_scaling=dict(scaling), max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / theta ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return np.asarray(plain / scaled.numpy(), dtype=np.float32)


def test_ends_of_turns_come_from_the_file_and_its_template(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.chat_template": "{{ messages }}<|im_end|>"}
    model = open_model(convert(write_gguf(tmp_path / "model.gguf", metadata=keys), tmp_path / "out"))
    assert model.eos_token_ids == (3, len(WORDS))
    assert model.chat_template == "{{ messages }}<|im_end|>"


@pytest.mark.parametrize(("rule", "tokens"), [("llama-bpe", ["zyx"]), ("gpt-2", ["z", "y", "x"])])
def test_words_that_are_tokens_are_taken_whole_where_the_rule_says_so(
    rule: str, tokens: list[str], tmp_path: Path
) -> None:
    keys = {
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [*WORDS, "zyx"],
        "tokenizer.ggml.token_type": [1] * (len(WORDS) + 1),
    }
    source = open_gguf(write_gguf(tmp_path / "model.gguf", metadata=keys))
    assert tokenizer_of(source).encode("zyx").tokens == tokens


REFUSED = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba'"),
    "format": ({"kind": Q.Q5_1}, "format Q5_1"),
    "missing tensor": ({"leave_out": ("blk.1.ffn_up.weight",)}, "lacks 1 tensors.*blk.1.ffn_up.weight"),
    "unknown tensor": ({"extra": {"blk.0.ssm_a.weight": np.zeros(4, np.float32)}}, "'blk.0.ssm_a.weight'"),
    "layer too many": (
        {"extra": {"blk.7.ffn_up.weight": np.zeros((4, 4), np.float32)}},
        "'blk.7.ffn_up.weight'",
    ),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
    "rope scaling": ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "'longrope'"),
    "partial rotary": ({"metadata": {"llama.rope.dimension_count": 32}}, "rope.dimension_count is 32"),
    "a piece": ({"metadata": {"split.count": 3}}, "one of 3 pieces"),
    "no heads": ({"metadata": {"llama.attention.head_count": None}}, "head_count is None"),
    "text for a number": ({"metadata": {"llama.block_count": "two"}}, "block_count is 'two'"),
    "tokenizer kind": ({"metadata": {"tokenizer.ggml.model": "bert"}}, "'bert' tokenizer"),
    "splitting rule": ({"metadata": {"tokenizer.ggml.pre": "nonesuch"}}, "'nonesuch' is not read"),
    "no tokenizer": ({"metadata": {"tokenizer.ggml.tokens": None}}, "no tokenizer"),
    "token twice": ({"metadata": {"tokenizer.ggml.tokens": [*WORDS, "a"]}}, "'a' occurs twice"),
    "types too few": ({"metadata": {"tokenizer.ggml.token_type": [1]}}, "one entry for each token"),
    "merge of strangers": ({"metadata": {"tokenizer.ggml.merges": ["x yz"]}}, "merges do not fit"),
    "merge of one": ({"metadata": {"tokenizer.ggml.merges": ["x"]}}, "merge 'x' is not two tokens"),
    "bos outside": (
        {"metadata": {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999}},
        "bos_token_id is 999",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    source = write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(ModelError, match="1 MB are free"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fixture", ["smollm2_dir", "gemma3_dir"])
def test_demo_models_hold_the_tensors_that_transformers_reads(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """A sample of each kind of tensor: those of the first layers, the norm at the end."""
    directory: Path = request.getfixturevalue(fixture)
    file = open_gguf(directory / "original.gguf")
    names = gguf_weights.tensor_names(file)
    entries = open_model(directory).tensors
    assert {*names.values()} == {*entries}
    rng = np.random.default_rng(0)
    for name in rng.choice([name for name in names if "token_embd" not in name], 12, replace=False):
        tensor, entry = file.tensors[name], entries[names[name]]
        stored = np.fromfile(entry.path, np.float32, (entry.end - entry.begin) // 4, offset=entry.begin)
        if tensor.quantization == Q.F32:
            expected = file.rows(name).view(np.float32).ravel() - (1 if fixture == "gemma3_dir" else 0)
            assert np.array_equal(stored, expected)
        else:
            values = dequantised(file.rows(name), tensor.quantization, tensor.shape)
            if fixture == "smollm2_dir" and ("attn_q" in name or "attn_k" in name):
                values = values.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
            assert np.array_equal(stored.reshape(values.shape), values)
