"""Gateways that come back and gateways side by side; and lives that do not depend on the order of hashes."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys

import pytest

from headrace.cluster.options import GatewayOptions
from headrace.protocol.messages import Role
from headrace.sim import Crash, Simulation, run
from headrace.sim.cluster import GATEWAY, SimCluster
from headrace.sim.load import Load, draw_request

WORKERS = {"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE}


@pytest.mark.parametrize("how", list(Crash))
def test_a_restarted_gateway_knows_its_cluster_within_two_heartbeats(how: Crash) -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, WORKERS)
        await cluster.start()
        await asyncio.sleep(0.5)  # all are welcomed
        await cluster.gateways[GATEWAY].crash(how)
        await cluster.gateways[GATEWAY].restart()
        # Of a machine that went silently its workers learn when its session lapses.
        lapse_s = cluster.options.lapse_s if how is Crash.SILENT else 0.0
        await cluster.complete(lapse_s + 2 * GatewayOptions().heartbeat_s)
        await cluster.stop()

    run(main, max_virtual_s=100.0)


def test_two_gateways_share_the_workers() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, WORKERS, gateways=2)
        await cluster.start()
        load = Load(cluster, 1)
        for number, gateway in enumerate(cluster.live_gateways().values()):
            await load.ask(gateway, draw_request(random.Random(number), number))
            assert load.endings["length"] + load.endings["stop"] > 0
            assert load.endings["error"] == load.endings["refused"] == 0
        await cluster.settle()
        await cluster.stop()

    run(main, max_virtual_s=100.0)


@pytest.mark.parametrize("seed", [0, 6])
def test_a_life_is_the_same_whatever_the_order_of_hashes(seed: int) -> None:
    program = f"from headrace.sim.life import live; print(live({seed}).trace_hash)"
    hashes = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": order},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order in ("1", "4711")
    ]
    assert hashes[0] == hashes[1] != ""
