"""`headrace version`: what is installed, in one line each."""

from __future__ import annotations

import platform
from importlib import metadata

import typer

from headrace import __version__

_TOLD = ("torch", "tokenizers", "fastapi", "uvicorn")


def version() -> None:
    """Print the versions of Headrace and of what it stands on."""
    typer.echo(f"headrace {__version__}")
    typer.echo(f"python {platform.python_version()} on {platform.machine()}")
    for name in _TOLD:
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
