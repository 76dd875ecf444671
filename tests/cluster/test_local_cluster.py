"""A gateway with a door for workers of elsewhere."""

from __future__ import annotations

import asyncio
import re

from headrace.cluster import LocalCluster
from headrace.world import real_world


def test_it_says_where_workers_may_join_with_the_port_that_it_became() -> None:
    lines: list[str] = []

    async def main() -> None:
        local = LocalCluster(real_world(), {}, listen="127.0.0.1:0", report=lines.append)
        starting = asyncio.create_task(local.start())
        try:
            async with asyncio.timeout(10):
                while not lines:
                    await asyncio.sleep(0.01)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await local.stop()

    asyncio.run(main())
    found = re.fullmatch(r"workers may join at 127\.0\.0\.1:(\d+)", lines[0])
    assert found is not None, lines
    assert int(found[1]) > 0
