"""Text to token ids and back.

A thin shell around the `tokenizers` library that adds what a server needs: which ids end a text, what bytes a
token is, and encoding text from outside without letting it spell control tokens.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer as Backend

from headrace.store import ModelFiles

from .errors import TextError, UnsupportedTokenizerError
from .pieces import ByteLevelPieces, SentencePieces, pieces_of

# A text is encoded in the thread that asks. Else the library would hand it to a pool of its own, which gains
# nothing for one text, and complain about every fork after that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Encodes and decodes. Safe to share between threads.

    `bos_token_id` begins a text where the model has such a token, `eos_token_ids` end one; they come from the
    model's configuration, not from the tokenizer file.
    """

    bos_token_id: Final[int | None]
    eos_token_ids: Final[tuple[int, ...]]
    special_ids: Final[frozenset[int]]
    """Ids of control tokens: left out of decoded text unless asked for."""
    pieces: Final[ByteLevelPieces | SentencePieces]

    def __init__(
        self, backend: Backend, *, bos_token_id: int | None = None, eos_token_ids: Sequence[int] = ()
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._plain: Backend | None = None
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.pieces = pieces_of(backend)
        self._vocab_size = 1 + max(
            (max(backend.get_vocab(with_added_tokens=True).values(), default=-1), *added), default=-1
        )

    @classmethod
    def from_file(
        cls, path: Path, *, bos_token_id: int | None = None, eos_token_ids: Sequence[int] = ()
    ) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises `UnsupportedTokenizerError` for what cannot be read."""
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises the bare class for every kind of broken file
            raise UnsupportedTokenizerError(f"{path} is not a tokenizer that can be read: {error}") from error
        return cls(backend, bos_token_id=bos_token_id, eos_token_ids=eos_token_ids)

    def fingerprint(self) -> bytes:
        """Equal ones turn the same text into the same ids. Takes a moment: the whole tokenizer is hashed."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).digest()

    @classmethod
    def from_model(cls, files: ModelFiles) -> "Tokenizer":
        """The tokenizer of a model, with the ids that its configuration names."""
        return cls.from_file(
            files.tokenizer, bos_token_id=files.bos_token_id, eos_token_ids=files.eos_token_ids
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a token has; a model's logits may have more columns."""
        return self._vocab_size

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`. `add_special_tokens`: with what the model expects around a text, such as a leading
        BOS. `parse_special`: whether "<|im_end|>" in the text is the control token or ten characters.
        Other threads of the interpreter run on meanwhile.

        Raises `TextError` for text with unpaired surrogates, which has no UTF-8 form.
        """
        backend = self._backend if parse_special else self._without_special()
        try:
            # Of the library's ways to encode, those for several texts release the interpreter's lock, and the
            # fast one does not note where each token lies in the text, which nobody asks here.
            return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError):  # which of them differs between versions of the library
            _check_unicode(text)
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; empty outside the vocabulary."""
        return self.pieces.token_bytes(token_id)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Spelling of a token in the vocabulary, or None outside it."""
        return self._backend.id_to_token(token_id)

    def _without_special(self) -> Backend:
        # A copy made once, since the switch is a property of the whole tokenizer and others may be encoding.
        if self._plain is None:
            plain = Backend.from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text has an unpaired surrogate at position {error.start}: it is not valid Unicode"
        ) from error
