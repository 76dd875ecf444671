"""Record the token ids that llama.cpp gives, for `test_tokenizers.py` to compare with.

Run by hand where llama-cpp-python and gguf are installed (they need not be for the tests), with the paths of
the two demo models' GGUF files, which `headrace models pull` keeps as original.gguf:

    python tests/oracle/record_llamacpp_tokens.py SMOLLM2.gguf GEMMA3.gguf > tests/oracle/llamacpp_tokens.json

Besides the files as they are it records variants: SmolLM2's vocabulary under the splitting rules of other
models, and Gemma's with a space before the text, as Llama 2 has it.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from tokenizer_texts import TEXTS

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "smollm2-135m": [
        {"tokenizer.ggml.pre": "gpt-2"},
        {"tokenizer.ggml.pre": "llama-bpe"},
        {"tokenizer.ggml.pre": "qwen2"},
        {"tokenizer.ggml.pre": "tekken"},
    ],
    "gemma3-270m": [{"tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.add_eos_token": True}],
}


def main(smollm2: Path, gemma3: Path) -> None:
    records = []
    for name, path in (("smollm2-135m", smollm2), ("gemma3-270m", gemma3)):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for changes in ({}, *VARIANTS[name]):
            with tempfile.TemporaryDirectory() as scratch:
                variant = path
                if changes:
                    variant = Path(scratch) / "vocabulary.gguf"
                    _rewrite(path, variant, changes)
                records.append({"model": name, "sha256": sha256, "metadata": changes, **_record(variant)})
    result = {"llama_cpp_python": llama_cpp.__version__, "texts": TEXTS, "records": records}
    json.dump(result, sys.stdout, separators=(",", ":"))
    print()


def _record(path: Path) -> dict[str, Any]:
    """Ids with control tokens in the text read as such ("special") and as text ("plain"), and what llama.cpp
    adds before and after each."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    before, after = _around(model, b"x", True)
    ids: dict[str, list[list[int]]] = {"special": [], "plain": []}
    for text in TEXTS:
        for key, special in (("special", True), ("plain", False)):
            bare = model.tokenize(text.encode(), add_bos=False, special=special)
            if model.tokenize(text.encode(), add_bos=True, special=special) != [*before, *bare, *after]:
                raise SystemExit(f"{path}: what is added around {text!r} differs from other texts")
            ids[key].append(bare)
    return {"before": before, "after": after, **ids}


def _around(model: llama_cpp.Llama, text: bytes, special: bool) -> tuple[list[int], list[int]]:
    bare = model.tokenize(text, add_bos=False, special=special)
    full = model.tokenize(text, add_bos=True, special=special)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise SystemExit("adding special tokens changes the ids of the text")


def _rewrite(source: Path, target: Path, changes: dict[str, Any]) -> None:
    """A file with the metadata of `source` under `changes`, and no tensors."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        value = field.contents()
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, field.types[0])
    for key, value in changes.items():
        kind = GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.BOOL
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
