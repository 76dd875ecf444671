"""The HTTP side: OpenAI-compatible routes, text in and text out, streamed or whole.

In: HTTP requests. Out: requests of token ids to the gateway, and its outputs as text. It must not know
blocks, steps, or how many engines there are. No torch.
"""

from headrace.api.app import create_app
from headrace.api.served import ServedModel, Server

__all__ = ["ServedModel", "Server", "create_app"]
