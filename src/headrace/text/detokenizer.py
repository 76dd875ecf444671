"""Token ids to text, one at a time, for streaming.

In: ids in order. Out: pieces of text that put together are the text of all ids. A piece never ends inside a
character: bytes are held back until the character they begin is whole, or cannot become one.
"""

import codecs

from .pieces import ByteLevelPieces, SentencePieces
from .tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one sequence of ids into text as they come. Constant time per id, whatever came before.

    The pieces, with that of `flush`, add up to `tokenizer.decode(ids, skip_special_tokens)`. `continues`: the
    ids go on from a text that was there before, so that a space at their start is part of the text.
    (Vocabularies in the manner of Llama 2 put one before every text and take it off again when decoding.)
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        pieces = tokenizer.pieces
        self._decoder: _ByteLevel | _SentencePiece
        if isinstance(pieces, ByteLevelPieces):
            self._decoder = _ByteLevel(pieces)
        else:
            self._decoder = _SentencePiece(pieces, strip=pieces.strips_space and not continues)

    def push(self, token_id: int) -> str:
        """Text that is certain once this token is known; often all of the token's, sometimes none."""
        return "" if token_id in self._skipped else self._decoder.push(token_id)

    def flush(self) -> str:
        """What was held back, at the end of the sequence. An unfinished character becomes U+FFFD."""
        return self._decoder.flush()


class _ByteLevel:
    def __init__(self, pieces: ByteLevelPieces) -> None:
        self._pieces = pieces
        self._held = b""
        """The beginning of a character."""

    def push(self, token_id: int) -> str:
        piece = self._held + self._pieces[token_id] if self._held else self._pieces[token_id]
        if piece.isascii():
            self._held = b""
            return piece.decode()
        text, taken = codecs.utf_8_decode(piece, "replace")
        self._held = piece[taken:]
        return text

    def flush(self) -> str:
        text, self._held = self._held.decode(errors="replace"), b""
        return text


class _SentencePiece:
    """Bytes come one by one, and a run of them is text only if all of it is UTF-8; otherwise each byte is
    U+FFFD.

    So a run is held back until a token of another kind ends it.
    """

    def __init__(self, pieces: SentencePieces, strip: bool) -> None:
        self._pieces = pieces
        self._strip = strip
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if not piece:
            return ""
        return self._stripped(self._end_run() + piece if self._run else piece)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
