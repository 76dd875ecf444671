"""`headrace deploy`: files for the systems that run and watch a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.errors import clear_errors

app = typer.Typer(help="Print files for the systems that run and watch a cluster.", no_args_is_help=True)


@app.callback()
def deploy() -> None:
    """Makes each file a command of its own, also while there is one only."""


@app.command("prometheus-rules")
def rules(
    output: Annotated[
        Path | None, typer.Option(help="File to write; without, they are printed.", show_default=False)
    ] = None,
) -> None:
    """Print recording and alerting rules for Prometheus."""
    from headrace.deploy import prometheus_rules

    with clear_errors():
        if output is None:
            print(prometheus_rules(), end="")
        else:
            output.write_text(prometheus_rules(), encoding="utf-8")
