"""Streaming text: the pieces are the whole, and none is cut inside a character."""

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, llama2_like, single_bytes, spellable

from headrace.text import IncrementalDetokenizer, Tokenizer

ANY_TEXT = st.text(max_size=30).map(lambda text: text.encode("utf-8", "ignore").decode())
small = {"byte level": cache(byte_level), "llama 2": cache(llama2_like)}


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.fixture(params=["smollm2", "gemma3"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_add_up_to_the_library_s_text_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Ids at random, half of them single bytes: mostly no UTF-8 at all. Some lie outside the vocabulary."""
    one = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(single_bytes(tokenizer))
    one |= st.sampled_from(sorted(tokenizer.special_ids)[:20])
    ids = data.draw(st.lists(one, max_size=25))
    skip = data.draw(st.booleans())
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=80)
def test_no_piece_of_a_text_breaks_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = spellable(tokenizer, text)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    pieces = pieces_of(tokenizer, ids, skip=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@pytest.mark.parametrize("kind", small)
@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_small_vocabularies_decode_as_the_library_does(kind: str, data: st.DataObject) -> None:
    """With so few tokens every order of bytes, spaces and special tokens comes up."""
    tokenizer = small[kind]()
    interesting = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xED, 0xA0, 0xFF, 0x41]
    if kind == "byte level":
        interesting = [tokenizer.token_to_id(token) or 0 for token in byte_spellings(interesting)]
    last = tokenizer.vocab_size
    one = st.sampled_from(interesting) | st.integers(last - 8, last + 1) | st.integers(0, last)
    ids = data.draw(st.lists(one, max_size=12))
    skip = data.draw(st.booleans())
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def byte_spellings(values: list[int]) -> list[str]:
    tokenizer = small["byte level"]()
    spelling = {tokenizer.token_bytes(i): tokenizer.id_to_token(i) for i in range(256)}
    return [spelling[bytes([value])] or "" for value in values]


def test_text_comes_as_soon_as_it_is_certain(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("One 😀!")
    pieces = pieces_of(smollm2, ids)
    assert pieces[0] == "One"
    with_face = next(i for i, piece in enumerate(pieces) if "😀" in piece)
    assert all("\ufffd" not in piece for piece in pieces) and pieces[with_face + 1] == "!"
    assert pieces[-1] == ""


def test_an_unfinished_character_is_replaced_at_the_end(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    ids = smollm2.encode("😀")[:-1]
    assert pieces_of(smollm2, ids)[:-1] == [""] * len(ids) and pieces_of(smollm2, ids)[-1] == "\ufffd"
    half = [gemma3.token_to_id("<0xF0>") or 0, gemma3.token_to_id("<0x9F>") or 0]
    assert pieces_of(gemma3, half) == ["", "", "\ufffd\ufffd"]


def test_a_space_before_the_text_is_part_of_it_only_where_text_goes_on() -> None:
    tokenizer = llama2_like()
    ids = tokenizer.encode("a a", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == "a a"
    following = IncrementalDetokenizer(tokenizer, continues=True)
    assert "".join(following.push(i) for i in ids) + following.flush() == " a a"


def test_the_cost_of_a_token_does_not_grow(smollm2: Tokenizer) -> None:
    """A hundred thousand tokens take no longer a token than a thousand: generous, for a busy machine."""
    ids = smollm2.encode("some words that go on, and on. ") * 10_000

    def seconds_per_token(count: int) -> float:
        detokenizer = IncrementalDetokenizer(smollm2)
        begin = time.process_time()
        for token_id in ids[:count]:
            detokenizer.push(token_id)
        return (time.process_time() - begin) / count

    short = min(seconds_per_token(2_000) for _ in range(5))
    assert seconds_per_token(len(ids)) < 5 * short + 2e-6
