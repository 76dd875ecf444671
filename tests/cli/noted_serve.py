"""Runs `serve` and `gateway` with a service that only notes what it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import headrace.api.service
import headrace.store
from headrace.cli.app import app
from headrace.config import EngineOptions
from headrace.store import ModelFiles

Run = Callable[..., tuple[int, str, dict[str, Any]]]


def noted_serve(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Run:
    """Gives a function of a command line that returns exit code, output, and what the service was given.

    That is `files`, `engine`, `gateway`, `pools`, `others`, `names`; and `model`, the first that was looked
    for. What was looked for is the name of a model, and its revision.
    """
    given: dict[str, Any] = {}

    class Noting:
        def __init__(self, files: ModelFiles, options: EngineOptions, bound: Any, **more: Any) -> None:
            bound.close()
            given.update(more, files=files, engine=options)

        async def run(self) -> None:
            pass

    def resolve(model: str, progress: object) -> ModelFiles:
        given.setdefault("model", model)
        return ModelFiles(
            name=model,
            directory=directory,
            config={},
            generation_config={},
            tokenizer_config={},
            weights=(),
            tensors={},
            tokenizer=directory,
            chat_template=None,
            revision=model,
        )

    monkeypatch.setattr(headrace.api.service, "Service", Noting)
    monkeypatch.setattr(headrace.store, "resolve", resolve)
    monkeypatch.setattr("headrace.worker.memory.available_memory", lambda: None)
    monkeypatch.setenv("HEADRACE_HOME", str(directory))
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)

    def run(command: str, *options: str) -> tuple[int, str, dict[str, Any]]:
        given.clear()
        result = CliRunner().invoke(app, [command, "--port", "0", *options])
        return result.exit_code, result.output, dict(given)

    return run
