"""What other systems are given to run and watch a cluster: files in their own forms.

In: nothing. Out: text. It must not know a running server.
"""

from __future__ import annotations

from importlib.resources import files


def prometheus_rules() -> str:
    """Recording and alerting rules for Prometheus, as YAML."""
    return (files(__package__) / "prometheus" / "headrace.rules.yaml").read_text(encoding="utf-8")


__all__ = ["prometheus_rules"]
