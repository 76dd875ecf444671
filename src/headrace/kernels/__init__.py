"""The operations of a decoder behind one interface, the batch they work on, and their implementations."""

from headrace.kernels.base import Activation, AttentionSpec, Kernels, KVCacheLayer, Linear

__all__ = ["Activation", "AttentionSpec", "KVCacheLayer", "Kernels", "Linear"]
