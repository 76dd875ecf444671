"""What a fleet's workers are made of, from a few words: hardware, a model, how many devices.

In: names of data sheets and shapes, or a file of `headrace calibrate`. Out: the cost of steps and the rate of
the network, with where they are from, since a prediction is worth no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from headrace.sim.cost import DEVICES, Efficiency, ModelShape, StepCost, model, rates_of
from headrace.sim.cost.calibration import Calibration

DEFAULT_MODEL = "llama-70b"
FULL = 0.95
"""Of a device's memory: what weights and KV cache may take when the number of devices is chosen."""
MOST_DEVICES = 8
"""That are chosen for one worker: those of one machine."""
FARTHEST = 100
"""How many times as many weights a model may have as the one that was calibrated, or as few."""
CALIBRATED_NIC_BYTES_PER_S = 1.1e9
"""Nobody has measured the network of a machine that was calibrated: 10 Gbit/s."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker is made of."""

    hardware: str
    cost: StepCost
    nic_bytes_per_s: float
    calibration: Calibration | None
    """Where the rates are from; None: from a data sheet."""

    def limits(self, cache_tokens: int, stride: int) -> list[str]:
        """What a prediction with it rests on and leaves out, in sentences."""
        cost, found = self.cost, self.calibration
        if found is None:
            lines = [
                f"{cost.shape.name} on {cost.devices} x {self.hardware} a worker, by data sheet and assumed "
                "efficiencies, not measured: times may be off by half"
            ]
            each, most = cost.memory_bytes(cache_tokens), DEVICES[self.hardware].memory_bytes
            if each > most:
                lines.append(
                    f"weights and {cache_tokens} tokens of KV are {each / 1e9:.0f} GB on each device, which "
                    f"has {most / 1e9:.0f} GB: no such worker can be built as it is"
                )
        else:
            mean, most = found.held_out.mean, found.held_out.most
            lines = [
                f"{found.machine}; steps are off by {mean:.0%} in the mean and {most:.0%} at most, with "
                f"sequences of up to {found.longest} tokens"
            ]
            if cost.shape != found.shape:
                times = cost.shape.weights / found.shape.weights
                lines.append(
                    f"CARRIED OVER: it was calibrated with {found.shape.name}, not with {cost.shape.name}, "
                    f"of {_times(times)} weights: memory and arithmetic are taken to be as fast with these, "
                    "and what a step takes beside them as long; times may be off by half"
                )
        if stride > 1:
            lines.append(f"decode steps run {stride} at a time: what comes to a worker waits for their end")
        lines.append(
            "left out: tokenising, HTTP, the gateway's own time, start-up, failures, and the way of blocks "
            "through a host's memory"
        )
        return lines


def choose_worker(hardware: str, name: str | None, devices: int | None, cache_tokens: int) -> Worker:
    """`hardware` is a device's name or a calibration's file, `name` a shape's, `devices` those of a worker.

    Without a number, as many as hold weights and cache. Raises OSError, ValueError that says what there is.
    """
    if hardware in DEVICES:
        one = DEVICES[hardware]
        shape = model(name or DEFAULT_MODEL)
        count = devices or _fewest(shape, one.memory_bytes, cache_tokens)
        nic = one.nic_bytes_per_s * Efficiency().nic * count
        return Worker(hardware, StepCost(shape, rates_of(one), count), nic, None)
    path = Path(hardware)
    if not path.is_file():
        raise ValueError(f"--hardware {hardware}: neither a file nor one of {', '.join(DEVICES)}")
    found = Calibration.read(path)
    if (devices or 1) > 1:
        raise ValueError(f"--devices {devices}: a calibration is of one device and knows no links to others")
    shape = _carried_over(found, model(name)) if name is not None else found.shape
    cost = StepCost(shape, found.rates)
    return Worker(hardware, cost, CALIBRATED_NIC_BYTES_PER_S, found)


def _carried_over(found: Calibration, shape: ModelShape) -> ModelShape:
    """Another model in the precision that was calibrated, whose kernels these rates are of.

    Raises ValueError for one of so different a size that they say nothing of it.
    """
    if shape.name == found.shape.name:
        return found.shape
    times = shape.weights / found.shape.weights
    if not 1 / FARTHEST <= times <= FARTHEST:
        raise ValueError(
            f"--model {shape.name} has {_times(times)} weights than {found.shape.name}, with which this "
            f"machine was calibrated; beyond {FARTHEST} times, what one reaches says nothing of the other. "
            "Calibrate with a model nearer to it"
        )
    measured = found.shape
    return replace(shape, weight_bytes_each=measured.weight_bytes_each, kv_bytes_each=measured.kv_bytes_each)


def _times(times: float) -> str:
    return f"{times:.0f} times more" if times >= 1 else f"{1 / times:.0f} times fewer"


def _fewest(shape: ModelShape, memory_bytes: float, cache_tokens: int) -> int:
    """A power of two of devices that hold weights and cache; all that there may be, if none do."""
    rates = rates_of(next(iter(DEVICES.values())))
    count = 1
    while StepCost(shape, rates, count).memory_bytes(cache_tokens) > FULL * memory_bytes:
        if 2 * count > MOST_DEVICES or shape.heads % (2 * count):
            break
        count *= 2
    return count
