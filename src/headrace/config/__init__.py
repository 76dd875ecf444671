"""Options of every part, validated once at the edge and handed on as small frozen objects.

In: command line and files. Out: option objects that say what was asked. It must not know how anything is
built.
"""

from headrace.config.engine import Dtype, EngineOptions, KernelLibrary, Quantization
from headrace.config.serving import ApiKey, ServingOptions, read_keys
from headrace.config.sizes import format_size, parse_size

__all__ = [
    "ApiKey",
    "Dtype",
    "EngineOptions",
    "KernelLibrary",
    "Quantization",
    "ServingOptions",
    "format_size",
    "parse_size",
    "read_keys",
]
