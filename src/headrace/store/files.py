"""A model directory in Hugging Face layout, checked and described.

In: a directory. Out: `ModelFiles`, what every other room knows of a model on disk. Here files are looked at,
never loaded: config and tokenizer settings are parsed, of the weights the headers and some samples are read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from .safetensors_file import TensorEntry, content_digest, safetensors_index

MODEL_TYPES: Final = ("gemma3", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` that are served."""

_INDEX: Final = "model.safetensors.index.json"
_PREFIXES: Final = ("model.", "model.language_model.", "language_model.model.")
_EVERY_LAYER: Final = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    `config`, `generation_config` and `tokenizer_config` are the parsed JSON files, empty where a file is
    absent. `weights` are the safetensors files in order and `tensors` says where in them each tensor lies.
    `chat_template` is Jinja source or None. `revision` names the content of config and weights, however
    those are spread over files. Of the weights it sees what `content_digest` samples: enough to tell
    fine-tunes of one base apart.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    weights: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    tokenizer: Path
    chat_template: str | None
    revision: str

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from generation_config.json, else config.json."""
        found = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, or None."""
        found = self.generation_config.get("bos_token_id", self.config.get("bos_token_id"))
        return found if isinstance(found, int) else None

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(entry.end - entry.begin for entry in self.tensors.values())


def open_model(directory: Path, name: str | None = None) -> ModelFiles:
    """Check `directory` and describe it. Raises a `ModelError` that names the file and what is wrong with
    it."""
    if not directory.is_dir():
        raise ModelNotFoundError(f"{directory} is not a directory")
    config = _read_json(directory / "config.json", required=True)
    generation_config = _read_json(directory / "generation_config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    _check_config(directory, config)
    _check_token_ids(directory, generation_config, config)
    weights = _weight_files(directory)
    tensors = safetensors_index(weights)
    _check_index(directory, tensors)
    _check_tensors(directory, config, tensors)
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelFileError(
            f"{directory} has no tokenizer.json; convert its tokenizer with transformers: "
            "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )
    return ModelFiles(
        name=name or directory.absolute().name,
        directory=directory,
        config=config,
        generation_config=generation_config,
        tokenizer_config=tokenizer_config,
        weights=weights,
        tensors=tensors,
        tokenizer=tokenizer,
        chat_template=_chat_template(directory, tokenizer_config),
        revision=_revision(directory, tensors),
    )


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ModelFileError(
                f"{path.parent} has no {path.name}, so it is not a model directory"
            ) from None
        return {}
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} does not hold a JSON object")
    return content


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that is about text: a multimodal model keeps it apart."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _check_config(directory: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not served; "
            f"{', '.join(MODEL_TYPES)} are"
        )
    if config.get("quantization_config") is not None:
        named = config["quantization_config"]
        method = named.get("quant_method", "of an unnamed kind") if isinstance(named, dict) else named
        raise UnsupportedModelError(
            f"{directory / 'config.json'}: weights quantised with {method!r} are not served; take the "
            "unquantised checkpoint or a GGUF file"
        )
    text = text_config(config)
    required = ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"]
    if text.get("num_key_value_heads") is not None:  # else as many as there are heads
        required.append("num_key_value_heads")
    for key in required:
        value = text.get(key)
        if type(value) is not int or value <= 0:
            raise ModelFileError(f"{directory / 'config.json'}: {key} is {value!r}, not a positive integer")


def _check_token_ids(directory: Path, *configs: Mapping[str, Any]) -> None:
    for config in configs:
        for key in ("eos_token_id", "bos_token_id"):
            found = config.get(key)
            ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise ModelFileError(f"{directory}: {key} is {found!r}, not a token id or a list of them")


def _weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files: those that the index names, else model.safetensors, else all there are."""
    weight_map = _weight_map(directory)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelFileError(
                f"{directory} lacks {', '.join(missing)}, which {_INDEX} names; download it again"
            )
        return tuple(directory / name for name in names)
    if (directory / "model.safetensors").is_file():
        return (directory / "model.safetensors",)
    found = tuple(sorted(directory.glob("*.safetensors")))
    if found:
        return found
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code when loaded and are "
            "refused; take a safetensors or GGUF release of the model"
        )
    raise ModelFileError(f"{directory} has no *.safetensors file")


def _weight_map(directory: Path) -> dict[str, str] | None:
    if not (directory / _INDEX).exists():
        return None
    weight_map = _read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{directory / _INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(
                f"{directory / _INDEX} names {name!r}, which is not a safetensors file beside it"
            )
    return weight_map


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
    for tensor, file in (_weight_map(directory) or {}).items():
        if tensor not in tensors or tensors[tensor].path.name != file:
            raise ModelFileError(f"{directory / _INDEX} says that {tensor!r} is in {file}, but it is not")


def _check_tensors(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Every layer must have what all families have in common; the rest is for the model's own loader."""
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensors), _PREFIXES[0])
    needed = [f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"] + [
        f"{prefix}layers.{layer}.{part}.weight"
        for layer in range(text_config(config)["num_hidden_layers"])
        for part in _EVERY_LAYER
    ]
    missing = [name for name in needed if name not in tensors]
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ModelFileError(f"{directory}: {len(missing)} tensors are missing from its weights: {shown}")


def _chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the default one in `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        template = tokenizer_config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot read {path}: {error}") from error
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _revision(directory: Path, tensors: Mapping[str, TensorEntry]) -> str:
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    # The last 16 bytes are always the weights', so the parts cannot be taken for each other.
    digest.update(content_digest(tensors))
    return digest.hexdigest()
