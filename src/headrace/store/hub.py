"""Models from the Hugging Face hub, by their `organisation/name`.

Only what is served is fetched: JSON, templates and safetensors, never pickles or code. What was fetched once
is found again without a network.
"""

from pathlib import Path
from typing import Final

from .errors import DownloadError

IGNORED: Final = ["*/*", "consolidated*"]
"""Folders hold other formats of the same weights, and so do Mistral's consolidated files."""
ALLOWED: Final = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "NOTICE*"]


def fetch(repository: str) -> Path:
    """Directory of the hub's snapshot of `repository`. Raises `DownloadError` with what to do instead."""
    from huggingface_hub import snapshot_download  # costs 0.3 s, and most starts need no hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=ALLOWED, ignore_patterns=IGNORED))
    except HFValidationError as error:
        raise DownloadError(f"{repository!r} is not the id of a model on the hub: {error}") from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{repository} is not on this machine and the hub cannot be reached from it. Copy the model's "
            "directory here and give its path, import a GGUF file (headrace models import FILE.gguf), "
            "or take a built-in model (headrace models list)"
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(
            f"the hub refused {repository}: {error}. Check the id; for a gated model accept its licence "
            "there and set HF_TOKEN"
        ) from error
    except OSError as error:
        raise DownloadError(f"cannot download {repository}: {error}") from error
