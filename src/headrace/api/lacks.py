"""What this machine lacks for a cluster that a file asks for, said before anything starts.

In: a checked file and what the machine has. Out: sentences; nothing is fetched, started or taken.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.api.options import gateway_options
from headrace.cluster.routing.own import PolicyNotFoundError
from headrace.cluster.routing.policies import policy_of
from headrace.config import format_size, parse_size
from headrace.config.cluster import ROLES, ClusterFile
from headrace.config.engine import usable_cores
from headrace.store import ModelError, ModelFiles, look_for
from headrace.world.machine import available_memory, gpu_count
from headrace.world.nixl_messages import PACKAGES as NIXL_PACKAGES

_WITHOUT_NIXL = {
    "auto": "so KV blocks go over TCP; pip install 'headrace[nixl]'",
    "nixl": "and transfer.connector is nixl; pip install 'headrace[nixl]', or make it auto",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to run a cluster on."""

    cores: int
    memory: int | None
    """Bytes that can still be had, or None where the system does not say."""
    gpus: int
    nixl: bool
    """Whether KV blocks can be moved by NIXL."""

    @classmethod
    def this(cls) -> Machine:
        return cls(
            cores=usable_cores(),
            memory=available_memory(),
            gpus=gpu_count(),
            nixl=any(importlib.util.find_spec(name) for name in NIXL_PACKAGES),
        )


def faults(file: ClusterFile, path: Path | None = None) -> list[str]:
    """What is wrong on every machine, though the file alone does not show it; each begins with its field."""
    try:
        _try_policy(file, path)
    except PolicyNotFoundError:
        return []  # another machine may have it
    except ValueError as error:
        return [f"routing.policy: {error}"]
    return []


def lacks(file: ClusterFile, machine: Machine, path: Path | None = None) -> list[str]:
    """What the file, read from `path`, asks for and the machine has not, each with what to do or what happens
    instead."""
    counts = file.replicas()
    workers = sum(counts.values()) or 1
    model, said = _model(file)
    found = [said] if said else []
    found += [
        f"models.{name}: {source} {here}"
        for name, source in file.sources().items()
        if isinstance(here := _here(source), str)
    ]
    found += _policy(file, path)
    found += _memory(file, machine, workers, model)
    cores = file.engine.threads or machine.cores
    if cores > machine.cores:
        found.append(f"cores: engine.threads is {cores}, and there are {machine.cores}; lower it")
    elif workers > cores:
        found.append(
            f"cores: {workers} workers compute on {cores}, one thread each, and take turns; start fewer"
        )
    if machine.gpus == 0:
        found += [
            f"GPUs: there is none, and {field} measures them; use queue_length" for field in _of_gpus(file)
        ]
    if file.splits and not machine.nixl and file.transfer.connector != "tcp":
        found.append(f"NIXL: it is not installed, {_WITHOUT_NIXL[file.transfer.connector]}")
    return found


def _model(file: ClusterFile) -> tuple[ModelFiles | None, str]:
    if file.model is None:
        return None, ""
    try:
        here = look_for(file.model)
    except ModelError as error:
        return None, f"model: {error}. Name another with --set model=NAME"
    except OSError as error:
        return None, f"model: {file.model} cannot be read: {error}"
    return (None, f"model: {file.model} {here}") if isinstance(here, str) else (here, "")


def _here(source: str) -> ModelFiles | str:
    """A model's files; or what to say of it."""
    try:
        return look_for(source)
    except (ModelError, OSError) as error:
        return f"cannot be read: {error}"


def _policy(file: ClusterFile, path: Path | None) -> list[str]:
    """A class of the user's own has to be found here."""
    try:
        _try_policy(file, path)
    except PolicyNotFoundError as error:
        return [f"routing.policy: {error}"]
    except ValueError:
        return []  # one of the `faults`
    return []


def _try_policy(file: ClusterFile, path: Path | None) -> None:
    policy_of(gateway_options(file, path).routing, random.Random(0))


def _memory(file: ClusterFile, machine: Machine, workers: int, model: ModelFiles | None) -> list[str]:
    element_bytes = 4 if file.engine.dtype == "float32" else 2
    tensors = model.tensors.values() if model is not None else ()
    weights = sum(math.prod(tensor.shape) for tensor in tensors) * element_bytes
    cache = parse_size(file.engine.kv_cache_memory)
    need = workers * (weights + cache)
    if machine.memory is None or need <= machine.memory:
        return []
    each = f"{format_size(cache)} of KV cache" + (
        f" and {format_size(weights)} of weights" if weights else ""
    )
    return [
        f"memory: {workers} workers with {each} each need {format_size(need)}"
        f"{'' if weights else ' beside their weights'}, and {format_size(machine.memory)} are available; "
        "start fewer, or lower engine.kv_cache_memory"
    ]


def _of_gpus(file: ClusterFile) -> Iterator[str]:
    for role in ROLES:
        if (scaled := getattr(file.autoscale, role)) is None:
            continue
        for name in ("scale_up", "scale_down"):
            if getattr(scaled, name).gpu_utilization is not None:
                yield f"autoscale.{role}.{name}.gpu_utilization"
