"""What can be wrong with a model on disk, or on its way there.

Every refusal of this package is a `ModelError`: a `ValueError` whose text names the file, what is wrong with
it, the limit it broke, and what to do. Callers print it as it stands.
"""


class ModelError(ValueError):
    """A model that cannot be used as it is."""


class ModelNotFoundError(ModelError):
    """No model under this name or path."""


class ModelFileError(ModelError):
    """A file of the model is missing, truncated, corrupt or of a refused kind."""


class UnsupportedModelError(ModelError):
    """The files are sound, but hold an architecture, number format or tokenizer that is not served."""


class DownloadError(ModelError):
    """A model could not be fetched: no network, no package index, no space, or not the expected bytes."""
