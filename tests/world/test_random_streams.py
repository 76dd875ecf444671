"""Named random streams: fixed by seed and name, and independent of each other."""

from __future__ import annotations

from headrace.world import RandomStreams


def draws(streams: RandomStreams, name: str, count: int = 5) -> list[float]:
    return [streams.stream(name).random() for _ in range(count)]


def test_a_stream_is_fixed_by_seed_and_name() -> None:
    assert draws(RandomStreams(1), "router") == draws(RandomStreams(1), "router")
    families = [RandomStreams(seed) for seed in (0, 1, -1, 1 << 200, b"", b"1", b"0")]
    families += [RandomStreams(1).scope(name) for name in ("", "1", "router")]
    families += [RandomStreams(1).scope("a").scope("b"), RandomStreams(1).scope("b").scope("a")]
    names = ("router", "Router", "", "stream")
    assert len({draws(family, name, 1)[0] for family in families for name in names}) == len(families) * 4


def test_the_first_numbers_are_the_same_in_every_release() -> None:
    """A seed that once showed a defect must go on showing it."""
    assert RandomStreams(7).stream("router").getrandbits(64) == 0xE92A3FF6F278E628
    assert RandomStreams(7).scope("host a").stream("router").getrandbits(64) == 0x4DE8BA62BCFEE4C5


def test_a_stream_goes_on_where_it_was_and_no_other_moves_it() -> None:
    alone = draws(RandomStreams(3), "a", 10)
    streams = RandomStreams(3)
    mixed = []
    for _ in range(10):
        draws(streams, "b")
        mixed += draws(streams, "a", 1)
        draws(streams.scope("a"), "a")
    assert mixed == alone
