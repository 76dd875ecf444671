"""Imported tokenizers against llama.cpp's ids for the same GGUF files, and transformers' reading of them."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import TEXTS
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from headrace.store import ORIGINAL_GGUF
from headrace.store.builtin import BUILTIN_MODELS
from headrace.store.gguf_file import GGUFFile, open_gguf
from headrace.store.gguf_tokenizer import tokenizer_of

RECORDED = json.loads((Path(__file__).parent / "llamacpp_tokens.json").read_text(encoding="utf-8"))

LLAMA_CPP_DIFFERS = {
    # llama.cpp takes "</s>" for an end token by its spelling, so that it is text when control tokens are not
    # read. In Gemma's vocabulary it closes struck-out HTML, and the file marks it as text to be matched
    # whole.
    ("gemma3-270m", "plain"): {"<s>text</s>"},
}
"""Texts whose ids are not llama.cpp's, by model and by how control tokens are read, each with the reason."""

TRANSFORMERS_DIFFERS = {
    # transformers has no splitting rule for "smollm" and takes GPT-2's, which leaves a space with the number
    # that follows. llama.cpp takes numbers out first, one character at a time, as the model was published.
    "smollm2-135m": {
        "½ ⅓ ¼ ² ³ ¹ ① ② Ⅳ ⅷ",
        "१२३ ٤٥٦ 七八九 ๑๒๓",
        "- [ ] todo\n- [x] done\n  * nested\n    1. deep",
    },
    # The file spells tokens of several spaces with spaces and has them matched whole in the text, longest
    # first. transformers respells them with the stand-in for a space and merges towards them, so that long
    # runs are cut elsewhere, and stand-ins that were in the text are taken for spaces.
    "gemma3-270m": {"a" + " " * 33 + "b", " " * 100, "▁ ▁▁ a▁b ▁a"},
}
"""Texts that transformers reads otherwise than llama.cpp; llama.cpp is followed, since the format is its
own."""


@lru_cache
def gguf(directory: Path) -> GGUFFile:
    return open_gguf(directory / ORIGINAL_GGUF)


def directory_of(model: str, request: pytest.FixtureRequest) -> Path:
    fixture = {"smollm2-135m": "smollm2_dir", "gemma3-270m": "gemma3_dir"}[model]
    directory: Path = request.getfixturevalue(fixture)
    return directory


def test_recording_is_of_these_texts_and_files() -> None:
    assert RECORDED["texts"] == TEXTS
    assert len(set(TEXTS)) == len(TEXTS) == 200
    for record in RECORDED["records"]:
        assert record["sha256"] == BUILTIN_MODELS[record["model"]].sha256


@pytest.mark.parametrize(
    "record", RECORDED["records"], ids=lambda r: "-".join([r["model"], *map(str, r["metadata"].values())])
)
def test_ids_are_llama_cpps(record: dict[str, Any], request: pytest.FixtureRequest) -> None:
    directory = directory_of(record["model"], request)
    file = gguf(directory)
    tokenizer = tokenizer_of(replace(file, metadata=file.metadata | record["metadata"]))
    if not record["metadata"]:
        # Else an import was changed without a new IMPORT_FORMAT, and models imported before stay as they are.
        assert tokenizer.to_str() == (directory / "tokenizer.json").read_text(encoding="utf-8")
    for key in ("special", "plain"):
        tokenizer.encode_special_tokens = key == "plain"
        expected = dict(zip(TEXTS, record[key], strict=True))
        for added in (False, True):
            before, after = (record["before"], record["after"]) if added else ([], [])
            differing = {
                text for text in TEXTS if ids_of(tokenizer, text, added) != [*before, *expected[text], *after]
            }
            assert differing == LLAMA_CPP_DIFFERS.get((record["model"], key), set())


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_ids_are_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    """By the functions behind `AutoTokenizer.from_pretrained(…, gguf_file=…)`, which itself takes 15 seconds
    to look at Gemma's config as well."""
    directory = directory_of(model, request)
    architecture, vocabulary, settings = get_gguf_tokenizer(str(directory / ORIGINAL_GGUF))
    theirs, _ = convert_gguf_tokenizer(architecture, vocabulary)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    differing = {text for text in TEXTS if ids_of(theirs, text, False) != ids_of(ours, text, False)}
    assert differing == TRANSFORMERS_DIFFERS[model]
    before = [vocabulary["bos_token_id"]] if settings["add_bos_token"] else []
    assert ids_of(ours, "", True) == before


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_transformers_opens_the_imported_directory(model: str, request: pytest.FixtureRequest) -> None:
    model_dir = directory_of(model, request)
    ours = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(model_dir)
    for text in TEXTS:
        for added in (False, True):
            ids = ids_of(ours, text, added)
            assert theirs(text, add_special_tokens=added)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer: Tokenizer, text: str, added: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=added).ids
    return ids
