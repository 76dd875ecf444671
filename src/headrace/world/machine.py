"""What this machine can give a process: GPUs, file descriptors, memory that kernel and control group allow.

Out: numbers; memory in bytes. It must not know what they are for.
"""

from __future__ import annotations

import resource
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


def available_memory() -> int | None:
    """Bytes that can still be had without swapping, or None where the system does not say.

    The smaller of the machine's and the control group's: a container sees all of the machine's memory and is
    killed at its own limit.
    """
    found = [size for size in (_machine_memory(), _group_memory()) if size is not None]
    return min(found, default=None)


def gpu_count() -> int:
    """GPUs that NVIDIA's driver tells of."""
    return len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0


def most_files() -> float:
    """File descriptors that this process may have at once."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if most == resource.RLIM_INFINITY else most


def _machine_memory() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_memory() -> int | None:
    """What control group version 2 leaves; page cache counts as used there, but can be dropped."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
