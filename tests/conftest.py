"""Models that tests may ask for, fetched once into the user's own cache."""

from pathlib import Path

import pytest

from headrace.store import pull


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2 135M Instruct: Llama architecture, byte-level BPE, with a chat template."""
    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_dir() -> Path:
    """Gemma 3 270M: sliding and global layers, SentencePiece BPE, no chat template."""
    return pull("gemma3-270m")
