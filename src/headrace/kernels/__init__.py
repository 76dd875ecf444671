"""The operations of a decoder behind one interface, the batch they work on, and the libraries that implement it."""

from headrace.kernels.base import Activation, AttentionSpec, Kernels, KVCacheLayer, Linear

__all__ = ["Activation", "AttentionSpec", "KVCacheLayer", "Kernels", "Linear"]
