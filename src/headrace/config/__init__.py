"""Options of every part, validated once at the edge and handed on as small frozen objects.

In: command line and files. Out: option objects that say what was asked. It must not know how anything is
built.
"""

from headrace.config.engine import Dtype, EngineOptions, KernelLibrary
from headrace.config.sizes import format_size, parse_size

__all__ = ["Dtype", "EngineOptions", "KernelLibrary", "format_size", "parse_size"]
