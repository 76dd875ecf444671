"""What `headrace worker` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app

ELSEWHERE = ("--join", "10.0.0.1:7000", "--data-address", "10.0.0.2:0")


def worker(home: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["worker", "nothing", *options], env={"HEADRACE_HOME": str(home)})
    return result.exit_code, result.output


def test_no_credentials_are_made_to_join_another_machine(tmp_path: Path) -> None:
    code, output = worker(tmp_path, *ELSEWHERE)
    assert code == 1
    assert f"{tmp_path}/cluster does not exist" in output
    assert "copy those of a machine of the cluster" in output
    assert not (tmp_path / "cluster").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--join", "127.0.0.1:1,127.0.0.1:1"), "names a gateway twice"),
        (("--join", ","), "names no gateway"),
        (("--join", "10.0.0.1:7000"), "--data-address is 127.0.0.1:0"),
        (("--data-address", "0.0.0.0:0"), "no address to dial"),
    ],
)
def test_addresses_that_cannot_serve(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, output = worker(tmp_path, *options)
    assert code == 1
    assert words in output
