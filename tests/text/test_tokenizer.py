"""The tokenizer's own promises; that its ids are the right ones is in tests/oracle/test_tokenizers.py."""

import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, llama2_like, spellable
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from headrace.text import TextError, Tokenizer, UnsupportedTokenizerError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_special_tokens_come_from_the_model(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.vocab_size) == (1, (2,), 49152)
    assert (gemma3.bos_token_id, gemma3.eos_token_ids, gemma3.vocab_size) == (2, (1,), 262144)
    assert smollm2.token_to_id("<|im_end|>") == 2 and smollm2.id_to_token(2) == "<|im_end|>"
    assert smollm2.token_to_id("no such token") is None and smollm2.id_to_token(99999) is None
    assert 2 in smollm2.special_ids and 5000 not in smollm2.special_ids


def test_control_tokens_in_text_are_read_as_asked(smollm2: Tokenizer) -> None:
    text = "<|im_end|>"
    assert smollm2.encode(text) == [2]
    plain = smollm2.encode(text, parse_special=False)
    assert 2 not in plain and smollm2.decode(plain) == text
    assert smollm2.encode(text) == [2], "asking once must not change the next"


def test_bos_is_added_where_the_model_wants_it(gemma3: Tokenizer) -> None:
    assert gemma3.encode("") == [2] and gemma3.encode("", add_special_tokens=False) == []
    assert gemma3.encode("a", parse_special=False)[0] == 2
    assert gemma3.decode(gemma3.encode("a")) == "a"
    assert gemma3.decode(gemma3.encode("a"), skip_special_tokens=False) == "<bos>a"


@given(text=TEXT)
@settings(deadline=None, max_examples=150)
def test_text_survives_the_round_trip(smollm2: Tokenizer, gemma3: Tokenizer, text: str) -> None:
    for tokenizer in (smollm2, gemma3):
        expected = spellable(tokenizer, text)
        ids = tokenizer.encode(expected, add_special_tokens=False, parse_special=False)
        if tokenizer is gemma3:
            expected = expected.replace("▁", " ")  # which stands for a space in its vocabulary
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == expected


def test_bytes_of_tokens() -> None:
    tokenizer = byte_level()
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("é ab\n")) == "é ab\n".encode()
    assert tokenizer.token_bytes(tokenizer.encode("<end of turn>")[0]) == b"<end of turn>"
    assert tokenizer.token_bytes(tokenizer.encode("日本")[0]) == "日本".encode()
    assert tokenizer.token_bytes(10_000) == b""
    tokenizer = llama2_like()
    assert [tokenizer.token_bytes(i) for i in (0xC3, 256, 259)] == [b"\xc3", b" ", b" a"]


def test_unpaired_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(TextError, match="unpaired surrogate at position 2"):
        smollm2.encode("ab\ud800c")


def test_padding_and_truncation_in_the_file_are_ignored(smollm2_dir: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(smollm2_dir / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("one two three four five six")) == 6


def test_threads_share_one_tokenizer(smollm2: Tokenizer) -> None:
    expected = {special: smollm2.encode("a<|im_end|>b", parse_special=special) for special in (True, False)}
    wrong: list[bool] = []

    def work(special: bool) -> None:
        wrong.extend(
            special
            for _ in range(300)
            if smollm2.encode("a<|im_end|>b", parse_special=special) != expected[special]
        )

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.CTC()]
        ),
    ],
)
def test_decoders_of_another_kind_are_refused(decoder: decoders.Decoder | None) -> None:
    backend = Backend(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(UnsupportedTokenizerError, match=r"decoder .* is not read"):
        Tokenizer(backend)


def test_long_texts_have_the_ids_of_the_library_and_other_threads_run_on(
    smollm2: Tokenizer, gemma3: Tokenizer, smollm2_dir: Path, gemma3_dir: Path
) -> None:
    """The library's plain `encode` holds the interpreter's lock to its end, and so does everything else."""
    text = "".join(f"{number} été  \n<|im_end|>日本 don't {'a' * (number % 90)}" for number in range(3000))
    for tokenizer, directory in ((smollm2, smollm2_dir), (gemma3, gemma3_dir)):
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        for special in (False, True):
            found = tokenizer.encode(text, special)
            assert found == backend.encode(text, add_special_tokens=special).ids
    seen = []
    worker = threading.Thread(target=lambda: seen.append(smollm2.encode("1" * 400_000)))
    turns = 0
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # nobody is made to give the lock up: only who releases it lets others in
    try:
        worker.start()
        while not seen:
            turns += 1
            time.sleep(0.0001)
    finally:
        sys.setswitchinterval(switch_s)
        worker.join()
    assert turns > 20
    assert seen[0] == [smollm2.encode("1")[0]] * 400_000
