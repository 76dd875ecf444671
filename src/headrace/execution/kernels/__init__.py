"""Kernel libraries behind one interface, chosen by name and imported when chosen."""

from headrace.execution.kernels.base import Activation, AttentionSpec, Kernels, KVCacheLayer, Linear

__all__ = ["Activation", "AttentionSpec", "KVCacheLayer", "Kernels", "Linear"]
