"""A gateway and a decode worker here, a prefill worker behind a link that is cut, slowed and lossy.

Certificates and all: the processes are started by `headrace gateway` and `headrace worker`. What comes of a
request while its blocks are on their way must equal what comes of it afterwards, over a link that is whole.
Blocks cross it as bytes, and read with NIXL over TCP, as between machines.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asks import Answer, ask
from link import Link, why_not
from prometheus_client.parser import text_string_to_metric_families

from headrace.observe.metrics import TRANSFERRED
from headrace.world.nixl_messages import PACKAGES

WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(180)]

HAS_NIXL = any(importlib.util.find_spec(name) for name in PACKAGES)
PORT = 7000
START_TIMEOUT_S = 60.0
SENTENCE = "The river rose in the night, and by morning the lower fields had gone. "
AT_ONCE = 4


class Behind:
    """A cluster with its prefill worker behind a link."""

    def __init__(self, link: Link, model: Path, directory: Path, connector: str) -> None:
        self.link = link
        self._model = model
        self._directory = directory
        self.connector = connector
        self._processes: list[psutil.Popen] = []
        self.url = ""
        self._asked = 0

    def start(self) -> None:
        gateway = f"{self.link.near_host}:{PORT}"
        self._launch(
            "gateway", "gateway", "--listen", gateway, "--port", "0", "--prompt-length-threshold", "64"
        )
        self._until(lambda: (self._directory / "credentials" / "node.pem").exists(), "credentials")
        for role, host, inside in (
            ("decode", self.link.near_host, ()),
            ("prefill", self.link.far_host, self.link.inside),
        ):
            self._launch(
                role,
                *("worker", "--join", gateway, "--role", role, "--name", role, "--data-address", f"{host}:0"),
                *("--kv-cache-memory", "128MiB", "--threads", "1", "--batch-invariant"),
                *("--connector", self.connector),
                inside=inside,
            )
        self._until(lambda: "ready after" in self.said("gateway"), "the gateway serves")
        self.url = self.said("gateway").rpartition(": ")[2].strip().removesuffix("/v1")
        self.wait_state("prefill", "up", START_TIMEOUT_S)

    def _launch(self, name: str, command: str, *options: str, inside: tuple[str, ...] = ()) -> None:
        headrace = (sys.executable, "-m", "headrace", command, str(self._model))
        credentials = ("--credentials", str(self._directory / "credentials"))
        with open(self._directory / f"{name}.log", "w") as log:
            self._processes.append(
                psutil.Popen(
                    [*inside, *headrace, *options, *credentials],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # On one machine UCX would read from process to process, and nothing would cross the link.
                    env=os.environ | {"UCX_TLS": "tcp"},
                )
            )

    def stop(self) -> None:
        children = [child for process in self._processes for child in _family(process)]
        for process in self._processes:
            if process.is_running():
                process.send_signal(signal.SIGTERM)
        _, slow = psutil.wait_procs(children, timeout=20)
        for child in slow:
            child.kill()
        psutil.wait_procs(children, timeout=5)
        assert not slow, f"did not end: {slow}; {self._said_last()}"

    def said(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()

    def _said_last(self) -> dict[str, str]:
        return {log.stem: log.read_text()[-1500:] for log in self._directory.glob("*.log")}

    def _until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [process for process in self._processes if process.poll() is not None]
            assert not ended, (ended, self._said_last())
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}; {self._said_last()}"
            time.sleep(0.05)

    def cluster(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/cluster", timeout=10).json()
        return answer

    def wait_state(self, name: str, state: str, timeout_s: float = 30.0) -> None:
        self._until(
            lambda: any(w["id"] == name and w["state"] == state for w in self.cluster()["workers"]),
            f"{name} is {state}",
            timeout_s,
        )

    def wait_nothing_held(self) -> None:
        def quiet() -> bool:
            answer = self.cluster()
            blocks = [w["blocks"] for w in answer["workers"]]
            held = [b[n] for b in blocks for n in ("held", "leased", "quarantined")]
            return not answer["open_sequences"] and not any(held)

        self._until(quiet, "every block back", 40)

    def transfers(self) -> dict[str, float]:
        """How many transfers ended how."""
        page = httpx.get(f"{self.url}/metrics", timeout=10).text
        found = {"transferred": 0.0, "failed": 0.0}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "headrace:kv_transfers_total":
                    came = sample.labels["outcome"] == TRANSFERRED
                    found["transferred" if came else "failed"] += sample.value
        return found

    def bodies(self) -> list[dict[str, Any]]:
        """Long prompts that nobody has seen."""
        self._asked += AT_ONCE
        return [
            {
                "prompt": f"{self._asked + number}. " + SENTENCE * 40,
                "max_tokens": 16,
                "temperature": 0,
                "stream": True,
                "logprobs": 1,
            }
            for number in range(AT_ONCE)
        ]

    async def ask_all(self, bodies: list[dict[str, Any]]) -> list[list[Answer]]:
        async with httpx.AsyncClient() as client:
            return await asyncio.gather(*(ask(client, self.url, body) for body in bodies))


def _family(process: psutil.Process) -> list[psutil.Process]:
    if not process.is_running():
        return []
    return [process, *process.children(recursive=True)]


@pytest.fixture(
    scope="module",
    params=[
        "tcp",
        pytest.param(
            "nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed (headrace[nixl])")
        ),
    ],
)
def behind(
    request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Behind]:
    with Link() as link:
        cluster = Behind(link, smollm2_dir, tmp_path_factory.mktemp("behind"), request.param)
        try:
            cluster.start()
            yield cluster
        finally:
            link.mend()
            cluster.stop()


def check(behind: Behind, during: Callable[[], None]) -> None:
    """Ask, do something while the first blocks travel, and ask the same again over a whole link."""

    async def main() -> None:
        bodies = behind.bodies()
        before = behind.link.arrived()
        asking = asyncio.create_task(behind.ask_all(bodies))
        try:
            while behind.link.arrived() - before < 1 << 20:
                assert not asking.done(), "nothing came over the link"
                await asyncio.sleep(0.01)
            await asyncio.to_thread(during)
            async with asyncio.timeout(120):
                disturbed = await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        behind.link.mend()
        await asyncio.to_thread(behind.wait_state, "prefill", "up", 40)
        assert disturbed == await behind.ask_all(bodies)
        await asyncio.to_thread(behind.wait_nothing_held)

    asyncio.run(main())


def test_a_whole_link_transfers(behind: Behind) -> None:
    before = behind.transfers()["transferred"]
    check(behind, lambda: None)
    assert behind.transfers()["transferred"] >= before + AT_ONCE
    assert ("come over NIXL" in behind.said("decode")) == (behind.connector == "nixl"), behind.said("decode")


def test_a_slow_link_is_waited_for(behind: Behind) -> None:
    before = behind.transfers()
    behind.link.slow(100)
    check(behind, lambda: None)
    assert behind.transfers()["transferred"] > before["transferred"]


def test_a_lossy_link_loses_no_byte(behind: Behind) -> None:
    before = sum(behind.transfers().values())
    how = behind.link.lose(10)
    lost = 0

    def count() -> None:
        nonlocal lost
        deadline = time.monotonic() + 20
        while not (lost := behind.link.dropped()):
            assert time.monotonic() < deadline, f"no packet was lost ({how})"
            time.sleep(0.05)

    check(behind, count)
    assert lost > 0
    assert sum(behind.transfers().values()) >= before + AT_ONCE  # each came, or was given up and told so


def test_a_link_cut_in_mid_transfer_costs_a_recomputation(behind: Behind) -> None:
    before = behind.transfers()["failed"]
    behind.link.slow(40)
    check(behind, behind.link.cut)
    assert behind.transfers()["failed"] > before


def test_a_link_that_crawls_is_given_up(behind: Behind) -> None:
    """Too slow for a piece within the time that a silent source is given: computed at home."""
    before = behind.transfers()["failed"]
    behind.link.slow(40)
    check(behind, lambda: behind.link.slow(0.2))
    assert behind.transfers()["failed"] > before
