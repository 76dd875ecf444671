"""Devices as data, and from their data sheets to the rates that a step may reach on them.

Peaks are of NVIDIA's data sheets, dense bfloat16 (the sheets print twice that, with sparsity):

| device        | FLOP/s   | memory | bytes/s  | NVLink, both directions | data sheet                        |
|---------------|----------|--------|----------|-------------------------|-----------------------------------|
| A100 80GB SXM | 312e12   | 80 GB  | 2.039e12 | 600 GB/s                | "NVIDIA A100 Tensor Core GPU"     |
| H100 SXM      | 989.4e12 | 80 GB  | 3.35e12  | 900 GB/s                | "NVIDIA H100 Tensor Core GPU"     |
| H200 SXM      | 989.4e12 | 141 GB | 4.8e12   | 900 GB/s                | "NVIDIA H200 Tensor Core GPU"     |

The network is that of NVIDIA's own systems, one adapter for each device: 200 Gbit/s in DGX A100 (ConnectX-6),
400 Gbit/s in DGX H100 and H200 (ConnectX-7), by the systems' user guides.

Efficiencies are assumptions, not measurements: nobody has run this engine on these devices. Each is given
with a range in which well-tuned engines are found; a prediction should be read as a range, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.sim.cost.step import Rates


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator by its data sheet. Rates are peaks."""

    name: str
    flops_per_s: float
    """Dense bfloat16."""
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    """To the other devices of its machine, one direction."""
    nic_bytes_per_s: float
    """To other machines, one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Which part of the peaks a step reaches, and what it takes beside. All assumed; times in seconds."""

    linear: float = 0.6
    """Of the peak in large matrix products: 0.4 to 0.75."""
    attention: float = 0.4
    """Of the peak in attention of prompts: 0.25 to 0.65."""
    memory: float = 0.8
    """Of the memory's bandwidth, for weights: 0.6 to 0.92."""
    kv: float = 0.7
    """Of the memory's bandwidth, for KV blocks: 0.5 to 0.9."""
    link: float = 0.7
    """Of the bandwidth between devices in all-reduces: 0.5 to 0.85."""
    nic: float = 0.9
    """Of the network adapter: 0.7 to 0.97."""
    step_s: float = 1.5e-3
    """Of each step, with captured graphs: 0.3 to 5 ms."""
    row_s: float = 4e-6
    """Of each row: 1 to 20 µs."""
    all_reduce_s: float = 10e-6
    """Of each all-reduce of a few rows: 5 to 25 µs."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2.039e12, 80e9, 300e9, 25e9),
        Device("h100", 989.4e12, 3.35e12, 80e9, 450e9, 50e9),
        Device("h200", 989.4e12, 4.8e12, 141e9, 450e9, 50e9),
    )
}
"""By name; all of the SXM form."""


def device(name: str) -> Device:
    """A device by its name. ValueError names what there is."""
    if name not in DEVICES:
        raise ValueError(f"there is no device {name!r}; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def rates_of(one: Device, efficiency: Efficiency | None = None) -> Rates:
    """What a device is taken to reach."""
    part = efficiency or Efficiency()
    return Rates(
        linear_flops_per_s=one.flops_per_s * part.linear,
        attention_flops_per_s=one.flops_per_s * part.attention,
        bytes_per_s=one.bytes_per_s * part.memory,
        kv_bytes_per_s=one.bytes_per_s * part.kv,
        step_s=part.step_s,
        row_s=part.row_s,
        link_bytes_per_s=one.link_bytes_per_s * part.link,
        all_reduce_s=part.all_reduce_s,
    )
