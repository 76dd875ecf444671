"""What each token id adds to the text, for the two ways in which vocabularies spell bytes.

In: a `tokenizers.Tokenizer`. Out: `ByteLevelPieces` (GPT-2's alphabet, in which each character stands for a
byte: Llama 3, Qwen, SmolLM, Mistral's later models) or `SentencePieces` (plain text with "▁" for a space, and
`<0xE2>` for bytes outside the vocabulary: Llama 2, Mistral's first models, Gemma). They follow the decoders
of the `tokenizers` library, so that text put together from pieces is the text that the library decodes.
"""

import json
from contextlib import suppress
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from .errors import UnsupportedTokenizerError

_SPACE: Final = "▁"
_STRIP: Final = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for the characters from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Final = _byte_of_character()


class ByteLevelPieces:
    """Every token is some bytes; the text is all of them together, read as UTF-8."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id outside the vocabulary."""
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                piece = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token is spelled as plain text
                piece = token.encode()
            self._cache[token_id] = piece
        return piece

    token_bytes = __getitem__


class SentencePieces:
    """A token is text or a single byte. `strips_space`: one space at the start of a text is not part of
    it."""

    def __init__(self, backend: Backend, strips_space: bool) -> None:
        self.strips_space = strips_space
        self._backend = backend
        self._cache: dict[int, str | int] = {}

    def __getitem__(self, token_id: int) -> str | int:
        """The text of a token, or the byte that it stands for; "" for an id outside the vocabulary."""
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) or ""
            piece = token.replace(_SPACE, " ")
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                with suppress(ValueError):
                    piece = int(piece[3:5], 16)
            self._cache[token_id] = piece
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        piece = self[token_id]
        return bytes([piece]) if isinstance(piece, int) else piece.encode()


def pieces_of(backend: Backend) -> ByteLevelPieces | SentencePieces:
    """Raises `UnsupportedTokenizerError` for a decoder of neither kind."""
    decoder: dict[str, Any] = (
        json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    )
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelPieces(backend)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        spaces = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        if spaces and steps[3:] in ([], [_STRIP]):
            return SentencePieces(backend, strips_space=len(steps) == 4)
    raise UnsupportedTokenizerError(
        f"the tokenizer's decoder ({', '.join(kinds)}) is not read; byte-level BPE and SentencePiece with "
        "byte fallback are"
    )
