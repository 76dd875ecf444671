"""From what a user types to a model on disk.

Takes, in this order: a path to a directory or a GGUF file, the name of an installed or built-in model, a hub
id `organisation/name`. GGUF files are converted on first use and kept under the home, keyed by their content.
"""

import hashlib
import re
from pathlib import Path

from .builtin import BUILTIN_MODELS, PullListener, pull
from .errors import ModelNotFoundError
from .files import ModelFiles, open_model
from .home import IMPORT_FORMAT, check_name, install, installed, models_dir, provenance
from .hub import fetch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name_or_path: str | Path, listener: PullListener | None = None) -> ModelFiles:
    """The model that `name_or_path` stands for, fetched or converted first when it must be; `listener` hears
    of that.

    Raises a `ModelError` whose text says what is wrong and what to do.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return open_model(path)
    if path.is_file() or text.endswith(".gguf"):
        return open_model(import_gguf(path, listener=listener), name=path.stem)
    if text in BUILTIN_MODELS:
        return open_model(pull(text, listener))
    if text in installed():
        return open_model(models_dir() / text)
    if is_hub_id(text):
        return open_model(fetch(text), name=text)
    known = ", ".join(sorted({*BUILTIN_MODELS, *installed()}))
    raise ModelNotFoundError(
        f"no model {text!r}: it is neither a directory, a GGUF file, nor one of {known}; "
        "a model on the hub is written organisation/name"
    )


def is_hub_id(text: str) -> bool:
    """Whether `text` is written like a model's id on the hub."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def import_gguf(path: Path, name: str | None = None, listener: PullListener | None = None) -> Path:
    """Convert the GGUF file `path` into an installed model and return its directory.

    Under `name`, a model of that name is replaced when it came from another file. Without one, the directory
    is named after the file's stem and content, and made once.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"no file {path}")
    listener = listener or PullListener()
    key = _content_key(path)
    if name is None:
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", path.stem).lstrip("._+-")[:80] or "model"
        name = f"{stem}-{key[:12]}"

    def current(directory: Path) -> bool:
        record = provenance(directory) or {}
        return record.get("import_format") == IMPORT_FORMAT and record.get("content_key") == key

    def build(directory: Path) -> None:
        from .gguf_import import convert_gguf  # slow to load, and seldom needed

        listener.stage("convert")
        origin = {"source": str(path.resolve()), "content_key": key}
        convert_gguf(path, directory, origin, listener.progress)

    return install(check_name(name), build, is_current=current, waiting=listener.waiting)


def _content_key(path: Path) -> str:
    """Names a file's content without reading all of it: its header, its size and when it was last written."""
    from .gguf_file import open_gguf

    status = path.stat()
    parts = (open_gguf(path).header_digest, str(status.st_size), str(status.st_mtime_ns))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
