"""`headrace demo`: a small model, a real server, and the official client talking to it."""

from __future__ import annotations


def demo() -> None:
    """Fetch a small model, serve it, talk to it, show how fast it answers, and stop."""
