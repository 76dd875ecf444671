"""A GGUF file turned into a model directory in Hugging Face layout.

In: a path. Out: a directory with config, weights, tokenizer and chat template that any reader of that layout
opens. Everything is checked before the first byte is written.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .errors import DownloadError
from .gguf_config import config_of, generation_config_of
from .gguf_file import open_gguf
from .gguf_tokenizer import tokenizer_config_of, tokenizer_of
from .gguf_weights import converted_bytes, write_weights
from .home import IMPORT_FORMAT, PROVENANCE

_SPARE_BYTES: Final = 100_000_000
"""Room asked for beyond the weights: a large vocabulary's tokenizer.json takes up to 40 MB."""

Progress = Callable[[int, int], None]
"""Hears bytes done and bytes in all."""


def convert_gguf(source: Path, directory: Path, origin: dict[str, Any], progress: Progress) -> None:
    """Fill the empty `directory` with the model in `source`; `origin` is kept in its provenance file.

    Raises `ModelFileError` and `UnsupportedModelError` for what cannot be read and `DownloadError` where the
    disk is too small.
    """
    file = open_gguf(source)
    config = config_of(file)
    total = converted_bytes(file)
    free = shutil.disk_usage(directory).free
    need = total + _SPARE_BYTES
    if free < need:
        raise DownloadError(
            f"the model in {source.name} takes {need / 1e6:.0f} MB when converted, {free / 1e6:.0f} MB are "
            f"free under {directory.parent}; free some, or set HEADRACE_HOME to a larger disk"
        )
    tokenizer = tokenizer_of(file)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    _write_json(directory / "tokenizer_config.json", tokenizer_config_of(file))
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config_of(file))
    template = file.metadata.get("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    progress(0, total)
    write_weights(file, directory, wrote)
    licence = file.metadata.get("general.license")
    _write_json(
        directory / PROVENANCE,
        {"import_format": IMPORT_FORMAT, "licence": licence, "gguf_header": file.header_digest, **origin},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
