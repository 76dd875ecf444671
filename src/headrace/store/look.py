"""What is on this machine of a model, without fetching or converting anything.

In: what a user typed. Out: its files, or what `resolve` would have to do first.
"""

from pathlib import Path

from .builtin import BUILTIN_MODELS
from .errors import ModelNotFoundError
from .files import ModelFiles, open_model
from .home import installed, models_dir
from .names import is_hub_id, resolve


def look_for(name_or_path: str) -> ModelFiles | str:
    """The model's files, or in words what has to be done before it can be served.

    Raises a `ModelError` for what is no model, or cannot be used.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return open_model(path)
    if path.is_file():
        return "is converted from GGUF first"
    if name_or_path.endswith(".gguf"):
        raise ModelNotFoundError(f"no file {path}")
    if name_or_path in installed():
        return open_model(models_dir() / name_or_path)
    if (builtin := BUILTIN_MODELS.get(name_or_path)) is not None:
        return f"is pulled first, {builtin.nbytes / 2**20:.0f} MiB"
    if is_hub_id(name_or_path):
        return "is fetched from the hub first, unless it was before"
    return resolve(name_or_path)  # says what there is
