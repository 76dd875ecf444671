"""Options that several commands share: what a command of groups looks like from outside, and what it gets."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.cli.gateway import gateway
from headrace.cli.groups import spread
from headrace.cli.http_options import HttpFlags, SplitFlags
from headrace.cli.serve import serve
from headrace.cli.worker import worker
from headrace.cli.worker_options import WorkerFlags


@dataclass(frozen=True)
class Flags:
    size: Annotated[int, typer.Option(min=1, help="How large.")] = 3
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def run(*arguments: str) -> tuple[int, list[tuple[str, Flags, bool]]]:
    got: list[tuple[str, Flags, bool]] = []
    small = typer.Typer()

    @small.command()
    @spread
    def command(what: str, flags: Flags, loud: bool = False) -> None:
        """Does it."""
        got.append((what, flags, loud))

    return CliRunner().invoke(small, list(arguments)).exit_code, got


def test_a_group_is_an_option_for_each_field() -> None:
    assert run("x") == (0, [("x", Flags(), False)])
    given = ("x", "--size", "5", "--name", "a", "--name", "b", "--loud")
    assert run(*given) == (0, [("x", Flags(5, ["a", "b"]), True)])
    assert run("x", "--size", "0") == (2, [])
    assert run() == (2, [])


def test_commands_have_their_groups_and_the_same_defaults() -> None:
    groups = {
        serve: (HttpFlags, SplitFlags, WorkerFlags),
        gateway: (HttpFlags, SplitFlags),
        worker: (WorkerFlags,),
    }
    for command, its in groups.items():
        parameters = inspect.signature(command).parameters
        for group in its:
            for name, parameter in inspect.signature(group).parameters.items():
                assert parameters[name].default == parameter.default, name


def test_help_tells_of_the_step_timeout() -> None:
    for command in ("serve", "worker"):
        said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        assert "--step-timeout" in said
        assert "60.0" in said.split("--step-timeout")[1].split("--")[0]
