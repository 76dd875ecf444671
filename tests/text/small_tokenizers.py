"""Tokenizers of a few dozen tokens, for what the demo models' do not do, and what all tests ask of any."""

from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from headrace.text import Tokenizer


@cache
def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are one byte."""
    return [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]


def spellable(tokenizer: Tokenizer, text: str) -> str:
    """`text` without the characters that the vocabulary cannot spell: SmolLM2's lacks 21 bytes."""
    known = set(b"".join(map(tokenizer.token_bytes, single_bytes(tokenizer))))
    return "".join(character for character in text if known.issuperset(character.encode()))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "▁a", "é", "▁▁", "<s>"]


def llama2_like() -> Tokenizer:
    """SentencePiece with a space before each text, which decoding takes off again. Ids 0 to 255 are bytes."""
    vocabulary = {piece: i for i, piece in enumerate([*BYTES, *PIECES])}
    backend = Backend(models.BPE(vocabulary, [("▁", "a"), ("▁", "▁")], byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend, bos_token_id=vocabulary["<s>"])


def byte_level() -> Tokenizer:
    """One token for each byte, "ab" merged, and an added token with characters outside the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ab"])}
    backend = Backend(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<end of turn>", special=True), AddedToken("日本", special=False)])
    return Tokenizer(backend)
