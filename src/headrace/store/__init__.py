"""Model names to local files: directories, GGUF files, hub ids and the built-in demo models.

In: what a user typed. Out: `ModelFiles`. Knows nothing of tensors' meaning to a model, and never imports
torch.
"""

from .builtin import BUILTIN_MODELS, ORIGINAL_GGUF, BuiltinModel, PullListener, pull
from .errors import DownloadError, ModelError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from .files import ModelFiles, open_model
from .home import home_dir, installed, models_dir, remove
from .look import look_for
from .names import import_gguf, resolve
from .safetensors_file import TensorEntry, safetensors_index

__all__ = [
    "BUILTIN_MODELS",
    "ORIGINAL_GGUF",
    "BuiltinModel",
    "DownloadError",
    "ModelError",
    "ModelFileError",
    "ModelFiles",
    "ModelNotFoundError",
    "PullListener",
    "TensorEntry",
    "UnsupportedModelError",
    "home_dir",
    "import_gguf",
    "installed",
    "look_for",
    "models_dir",
    "open_model",
    "pull",
    "remove",
    "resolve",
    "safetensors_index",
]
