"""The operations of a decoder behind one interface, the batch they work on, and their implementations."""

from headrace.kernels.base import (
    Activation,
    AttentionSpec,
    GatedLinear,
    Kernels,
    KVCacheLayer,
    Linear,
    Operations,
    Program,
)

__all__ = [
    "Activation",
    "AttentionSpec",
    "GatedLinear",
    "KVCacheLayer",
    "Kernels",
    "Linear",
    "Operations",
    "Program",
]
