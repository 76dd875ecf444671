"""A second network namespace, and a link to it that can be slowed, made lossy and cut. Linux, as root.

The tests' own namespace is one end, `NETWORK.1`; what is started in the other has `NETWORK.2`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

_TICK_S = 0.004
"""What a queue may let through at once: less than the kernel's clock ticks apart, and it gets no further."""


class Link:
    """From entering to leaving the context."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self.name = f"hrfault{number}"
        self._near, self._far = f"hrf{number}a", f"hrf{number}b"
        self.near_host, self.far_host = f"10.231.{number}.1", f"10.231.{number}.2"

    def __enter__(self) -> Link:
        _run("ip", "netns", "add", self.name)
        try:
            _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far)
            _run("ip", "link", "set", self._far, "netns", self.name)
            _run("ip", "addr", "add", f"{self.near_host}/30", "dev", self._near)
            _run("ip", "link", "set", self._near, "up")
            _run("ip", "-n", self.name, "addr", "add", f"{self.far_host}/30", "dev", self._far)
            _run("ip", "-n", self.name, "link", "set", "lo", "up")
            self.mend()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        # With one end the other goes; the namespace goes with the last process in it.
        subprocess.run(["ip", "link", "del", self._near], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    @property
    def inside(self) -> tuple[str, ...]:
        """What goes before a command to run it at the far end."""
        return ("ip", "netns", "exec", self.name)

    def mend(self) -> None:
        """Whole again, and as fast as memory."""
        _run("ip", "-n", self.name, "link", "set", self._far, "up")
        subprocess.run(
            ["tc", "-n", self.name, "qdisc", "del", "dev", self._far, "root"],
            check=False,
            capture_output=True,
        )

    def cut(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        _run("ip", "-n", self.name, "link", "set", self._far, "down")

    def slow(self, megabits: float) -> None:
        """What comes from the far end queues: late, and whole."""
        burst = max(64_000, round(megabits * 1e6 / 8 * _TICK_S))
        self._shape("tbf", "rate", f"{megabits:g}mbit", "burst", f"{burst}b", "latency", "400ms")

    def lose(self, percent: int) -> str:
        """Lose packets from the far end; returns how: where the kernel has no netem, a queue overflows."""
        try:
            self._shape("netem", "loss", f"{percent}%")
        except OSError:
            # Room for two of the largest packets that the kernel sends in one piece: some get through.
            self._shape("tbf", "rate", "200mbit", "burst", "130kb", "limit", "130kb")
            return "overflow"
        return "netem"

    def dropped(self) -> int:
        """Packets that the far end's queue has lost."""
        said = _run("tc", "-n", self.name, "-s", "qdisc", "show", "dev", self._far)
        return sum(int(count) for count in re.findall(r"dropped (\d+)", said))

    def arrived(self) -> int:
        """Bytes that have come from the far end."""
        return int(Path(f"/sys/class/net/{self._near}/statistics/rx_bytes").read_text())

    def _shape(self, *how: str) -> None:
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", self._far, "root", *how)


def why_not() -> str:
    """Why there can be no link here; empty where there can."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"needs {' and '.join(missing)} of iproute2"
    try:
        with Link() as link:
            link.slow(100)
    except OSError as error:
        return f"network namespaces are not permitted here ({error})"
    return ""


def _run(*command: str) -> str:
    """Raises OSError with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
