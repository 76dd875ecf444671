"""From a GGUF file's vocabulary to the `tokenizer.json` of the same model.

In: metadata. Out: a `tokenizers.Tokenizer` that gives the ids that llama.cpp gives for the same file, and the
`tokenizer_config.json` beside it. Two kinds are read: byte-level BPE with a named rule for splitting text
into words ("gpt2"), and SentencePiece's BPE, where scores order the merges and unknown characters fall back
to bytes ("llama").
"""

from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import ModelFileError, UnsupportedModelError
from .gguf_file import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_ALWAYS_CONTROL: Final = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}
)
"""Tokens that end a turn, which some conversions mark as ordinary text."""

_SPACE: Final = "▁"

_GPT2_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS: Final = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a byte-level vocabulary cuts text into words before merging, as the models were published.

    `whole_words`: a word that is a token is taken as it is, without merging. `bos`: whether a text begins
    with the beginning-of-sequence token where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


_SPLITTINGS: Final = {
    "gpt-2": _Splitting((_GPT2_WORDS,)),
    "smollm": _Splitting((r"\p{N}", _GPT2_WORDS)),
    "llama-bpe": _Splitting((_LLAMA3_WORDS,), whole_words=True, bos=True),
    "llama3": _Splitting((_LLAMA3_WORDS,), whole_words=True, bos=True),
    "llama-v3": _Splitting((_LLAMA3_WORDS,), whole_words=True, bos=True),
    "qwen2": _Splitting((_QWEN2_WORDS,)),
    "deepseek-r1-qwen": _Splitting((_QWEN2_WORDS,)),
    "tekken": _Splitting((_TEKKEN_WORDS,), whole_words=True, bos=True),
}  # fmt: skip


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer. Raises `UnsupportedModelError` for a kind that is not read and `ModelFileError`
    for a vocabulary that does not hang together."""
    vocabulary = _Vocabulary(file)
    kind = vocabulary.kind
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    else:
        raise UnsupportedModelError(
            f"{file.path} holds a {kind!r} tokenizer; gpt2 (byte-level BPE) and llama are read"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=mark != _USER_DEFINED)
            for token, mark in zip(vocabulary.tokens, vocabulary.marks, strict=True)
            if mark in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    before = ["bos"] if vocabulary.adds_bos else []
    after = ["eos"] if vocabulary.adds_eos else []
    if before or after:
        special = {name: vocabulary.special_id(name) for name in before + after}
        tokens = {name: vocabulary.tokens[token_id] for name, token_id in special.items()}
        single = [*(tokens[name] for name in before), "$A", *(tokens[name] for name in after)]
        pair = [*(f"{tokens[name]}:1" for name in before), "$B:1", *(f"{tokens[name]}:1" for name in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + pair,
            special_tokens=[(tokens[name], token_id) for name, token_id in special.items()],
        )
    return tokenizer


def tokenizer_config_of(file: GGUFFile) -> dict[str, Any]:
    """The `tokenizer_config.json`: special tokens by name, and what is added around a text."""
    vocabulary = _Vocabulary(file)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get(f"{file.metadata['general.architecture']}.context_length"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if file.metadata.get(f"tokenizer.ggml.{name}_token_id") is not None:
            config[f"{key}_token"] = vocabulary.tokens[vocabulary.special_id(name)]
    return config


class _Vocabulary:
    """The tokenizer's metadata, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.kind: str = file.metadata.get("tokenizer.ggml.model", "")
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise ModelFileError(f"{file.path} has no tokenizer: tokenizer.ggml.tokens is missing")
        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise ModelFileError(f"{file.path}: token {twice!r} occurs twice in the vocabulary")
        marks = self._column("token_type", 1)
        self.marks = [
            _CONTROL if token in _ALWAYS_CONTROL else mark
            for token, mark in zip(self.tokens, marks, strict=True)
        ]
        splitting = _SPLITTINGS.get(self.pre)
        self.adds_bos: bool = self._flag(
            "add_bos_token", splitting.bos if splitting else self.kind == "llama"
        )
        self.adds_eos: bool = self._flag("add_eos_token", False)

    @property
    def pre(self) -> str:
        return str(self._file.metadata.get("tokenizer.ggml.pre", "")) if self.kind == "gpt2" else ""

    @property
    def splitting(self) -> _Splitting:
        if self.pre not in _SPLITTINGS:
            raise UnsupportedModelError(
                f"{self._file.path}: pre-tokenizer {self.pre!r} is not read; "
                f"{', '.join(sorted(_SPLITTINGS))} are"
            )
        return _SPLITTINGS[self.pre]

    @property
    def prefixes_space(self) -> bool:
        return self._flag("add_space_prefix", True)

    @property
    def scores(self) -> list[float]:
        return self._column("scores", 0.0)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs in order of rank. A token may itself begin with a space's stand-in, never with a
        space."""
        pairs = []
        for merge in self._file.metadata.get("tokenizer.ggml.merges", []):
            left, found, right = merge[1:].partition(" ")
            if not found:
                raise ModelFileError(f"{self._file.path} is corrupt: merge {merge!r} is not two tokens")
            pairs.append((merge[0] + left, right))
        return pairs

    def special_id(self, name: str) -> int:
        token_id = self._file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise ModelFileError(
                f"{self._file.path}: tokenizer.ggml.{name}_token_id is {token_id!r}, "
                f"the vocabulary has {len(self.tokens)} tokens"
            )
        return token_id

    def model(self, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
        try:
            return models.BPE(vocab=self.ids, merges=merges, **options)
        except Exception as error:  # the library raises the bare class, for a merge outside the vocabulary
            raise ModelFileError(
                f"{self._file.path}: its merges do not fit its vocabulary: {error}"
            ) from error

    def _column(self, key: str, default: Any) -> list[Any]:
        values = self._file.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise ModelFileError(
                f"{self._file.path}: tokenizer.ggml.{key} does not have one entry for each token"
            )
        return values

    def _flag(self, key: str, default: bool) -> bool:
        return bool(self._file.metadata.get(f"tokenizer.ggml.{key}", default))


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    splitting = vocabulary.splitting
    tokenizer = Tokenizer(vocabulary.model(vocabulary.merges, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    if any(f"<0x{byte:02X}>" not in vocabulary.ids for byte in range(256)):
        raise UnsupportedModelError("a SentencePiece vocabulary without a token for each byte is not read")
    unknown = vocabulary.tokens[vocabulary.special_id("unknown")]
    tokenizer = Tokenizer(
        vocabulary.model(_merges_by_score(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    to_spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.prefixes_space:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        tokenizer.decoder = decoders.Sequence([*to_spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = decoders.Sequence(to_spaces)
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first.

    SentencePiece merges whatever two neighbours make the token with the highest score; a merge list says the
    same when it is sorted by the score of the outcome.
    """
    ids = vocabulary.ids
    scores = vocabulary.scores
    ranked = [
        (-scores[token_id], token_id, token[:cut], token[cut:])
        for token, token_id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]
