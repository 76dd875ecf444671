"""Stop strings over a stream, against a plain search in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text import StopChecker


def search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    checker = StopChecker(stops, include)
    sent = [checker.push(piece) for piece in pieces]
    return [*sent, checker.flush()], checker.matched


LETTERS = st.text("ab", min_size=1, max_size=5)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(LETTERS | st.text("abc", min_size=1, max_size=3), max_size=4),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=600)
def test_any_cutting_gives_what_a_search_of_the_whole_gives(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    sent, matched = stream(pieces, stops, include)
    assert ("".join(sent), matched) == search("".join(pieces), stops, include)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(LETTERS, min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=250)
def test_nothing_is_held_back_without_need(pieces: list[str], stops: list[str]) -> None:
    """After each piece, what is held back is the longest end of the text that begins a stop string."""
    checker = StopChecker(stops)
    seen = sent = ""
    for piece in pieces:
        sent += checker.push(piece)
        seen += piece
        if checker.matched is not None:
            return
        longest = max(
            (k for stop in stops for k in range(len(stop)) if k <= len(seen) and seen.endswith(stop[:k])),
            default=0,
        )
        assert sent == seen[: len(seen) - longest]


def test_no_part_of_a_stop_string_is_sent() -> None:
    assert stream(["Hello\nUs", "er", ":", " more"], ["\nUser:"], False) == (
        ["Hello", "", "", "", ""],
        "\nUser:",
    )
    assert stream(["Hello\nUs", "er", ":", " more"], ["\nUser:"], True)[0] == ["Hello", "", "\nUser:", "", ""]


def test_what_turns_out_otherwise_is_sent_after_all() -> None:
    sent, matched = stream(["ab", "ab", "c"], ["abd"], False)
    assert (sent, matched) == (["", "ab", "abc", ""], None)
    assert stream(["xEN"], ["END"], False) == (["x", "EN"], None)


def test_the_first_to_end_wins_and_then_the_longest() -> None:
    assert stream(["abcd"], ["abcd", "bc"], False) == (["a", ""], "bc")
    assert stream(["xabc"], ["bc", "abc", "c"], False) == (["x", ""], "abc")


def test_without_stop_strings_text_passes_through() -> None:
    assert stream(["a", "", "b"], [], False) == (["a", "", "b", ""], None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
