"""The demo models' tokenizers, read once."""

from pathlib import Path

import pytest

from headrace.store import open_model
from headrace.text import Tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    """Byte-level BPE."""
    return Tokenizer.from_model(open_model(smollm2_dir))


@pytest.fixture(scope="session")
def gemma3(gemma3_dir: Path) -> Tokenizer:
    """SentencePiece with byte fallback, without a space before the text."""
    return Tokenizer.from_model(open_model(gemma3_dir))
