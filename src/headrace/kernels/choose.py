"""Which kernel library and which precision, for the options a user gave and the machine there is."""

from __future__ import annotations

import importlib.util

import torch

from headrace.config.engine import Dtype, KernelLibrary, Quantization
from headrace.kernels.base import Kernels

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class KernelsUnavailableError(ValueError):
    """The kernels asked for cannot run here; the text says why and what to do."""


def choose_kernels(
    library: KernelLibrary,
    *,
    dtype: Dtype,
    quantization: Quantization,
    batch_invariant: bool,
    threads: int,
) -> tuple[Kernels, str]:
    """The kernels to use, imported now, and in words what was decided.

    "auto" takes the native library where it was built. An "auto" dtype is bfloat16 where the processor
    multiplies it, else float32, which such a processor computes faster.
    """
    built = importlib.util.find_spec("headrace._native") is not None
    if library == "native" and not built:
        raise KernelsUnavailableError(
            "the native kernels were not built when headrace was installed; install a C++ compiler and "
            "headrace again, or choose --kernels reference"
        )
    if library == "reference" or not built:
        from headrace.kernels.reference import TorchKernels

        chosen = torch.float32 if dtype == "auto" else _DTYPES[dtype]
        kernels: Kernels = TorchKernels(
            dtype=chosen, quantization=quantization, batch_invariant=batch_invariant, threads=threads
        )
        return kernels, f"{_name(chosen, quantization)}, reference kernels in torch: slow, for comparison"

    from headrace.kernels.native import NativeKernels, multiplies_bfloat16

    chosen = _DTYPES.get(dtype, torch.bfloat16 if multiplies_bfloat16() else torch.float32)
    native = NativeKernels(
        dtype=chosen, quantization=quantization, batch_invariant=batch_invariant, threads=threads
    )
    return native, f"{_name(chosen, quantization)}, native kernels for {native.isa}, {threads} threads"


def _name(dtype: torch.dtype, quantization: Quantization) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantization == "none" else f"{quantization} weights, {name} beside them"
