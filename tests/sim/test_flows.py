"""How long transfers take that share network adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headrace.sim.flows import Adapters
from headrace.sim.loop import VirtualLoop


def run(body: Callable[[Adapters, VirtualLoop], Awaitable[None]]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(body(Adapters(loop, 100.0), loop))
    finally:
        loop.close()


async def ended(adapters: Adapters, loop: VirtualLoop, *transfer: str | float) -> float:
    source, target, size = transfer
    await adapters.carry(str(source), str(target), float(size))
    return loop.now


def test_alone_a_transfer_has_the_whole_adapter() -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        assert await ended(adapters, loop, "a", "b", 250) == pytest.approx(2.5)
        assert adapters.carried_bytes == {"a": 250}

    run(body)


@pytest.mark.parametrize("second", [("a", "c"), ("c", "b")])
def test_two_out_of_one_host_or_into_one_share_it(second: tuple[str, str]) -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        # Both at 50/s until the smaller is there at 2 s; the rest of the larger one at 100/s.
        times = await asyncio.gather(
            ended(adapters, loop, "a", "b", 300), ended(adapters, loop, *second, 100)
        )
        assert times == pytest.approx([4.0, 2.0])

    run(body)


def test_both_directions_and_other_hosts_are_free() -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        pairs = [("a", "b"), ("b", "a"), ("c", "d")]
        times = await asyncio.gather(*(ended(adapters, loop, *pair, 100) for pair in pairs))
        assert times == pytest.approx([1.0, 1.0, 1.0])

    run(body)


def test_what_one_cannot_use_the_others_get() -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        # Into x come three at 33.3/s each; a -> y gets the 66.7/s that a -> x leaves of a's adapter.
        pairs = [("a", "x"), ("b", "x"), ("c", "x")]
        into_x = [asyncio.create_task(ended(adapters, loop, *pair, 100)) for pair in pairs]
        beside = await ended(adapters, loop, "a", "y", 100)
        assert beside == pytest.approx(1.5)
        assert await asyncio.gather(*into_x) == pytest.approx([3.0, 3.0, 3.0])

    run(body)


def test_one_that_is_given_up_leaves_its_share_at_once() -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        given_up = asyncio.create_task(ended(adapters, loop, "a", "b", 1000))
        kept = asyncio.create_task(ended(adapters, loop, "a", "c", 100))
        await asyncio.sleep(1)
        given_up.cancel()
        assert await kept == pytest.approx(1.5)
        await asyncio.gather(given_up, return_exceptions=True)
        assert adapters.carried_bytes == {"a": 100}

    run(body)


def test_nothing_and_nowhere_take_no_time() -> None:
    async def body(adapters: Adapters, loop: VirtualLoop) -> None:
        assert await ended(adapters, loop, "a", "b", 0) == 0
        assert await ended(adapters, loop, "a", "a", 100) == 0

    run(body)
    with pytest.raises(ValueError, match="more than 0 bytes a second, got 0"):
        Adapters(VirtualLoop(), 0)
