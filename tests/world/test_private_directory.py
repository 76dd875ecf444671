"""A directory is removed by its owner, or else by the next that makes one; never a living one's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.world.private_directory import PrivateDirectory

OWNER = """
import sys
from headrace.world import private_directory
private_directory._LONGEST_PARENT = 1000  # a test's directories have long names
directory = private_directory.PrivateDirectory("headrace-")
(directory.path / "engine.sock").touch()
print(directory.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("headrace.world.private_directory._LONGEST_PARENT", 1000)
    return tmp_path


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_only_this_user_enters_and_it_is_gone_after(parent: Path) -> None:
    directory = PrivateDirectory("headrace-")
    assert directory.path.parent == parent
    assert directory.path.stat().st_mode & 0o777 == 0o700
    (directory.path / "engine.sock").touch()
    directory.remove()
    directory.remove()
    assert not list(parent.iterdir())


def test_a_killed_owners_is_removed_and_a_living_ones_is_not(
    parent: Path, owner: subprocess.Popen[str]
) -> None:
    assert owner.stdout is not None
    path = Path(owner.stdout.readline().strip())
    assert path.parent == parent
    mine = PrivateDirectory("headrace-")
    assert (path / "engine.sock").exists()
    owner.kill()
    owner.wait()
    assert (path / "engine.sock").exists()
    another = PrivateDirectory("headrace-")
    assert not path.exists()
    assert mine.path.exists()
    mine.remove()
    another.remove()


def test_what_is_not_known_to_be_dead_is_left_alone(parent: Path) -> None:
    (parent / "headrace-begun").mkdir()  # its owner has not come to lock it
    (parent / "headrace-file").touch()
    other = parent / "elsewhere"
    other.mkdir()
    (other / "lock").touch()
    (parent / "headrace-link").symlink_to(other)
    PrivateDirectory("headrace-").remove()
    assert sorted(path.name for path in parent.iterdir()) == [
        "elsewhere",
        "headrace-begun",
        "headrace-file",
        "headrace-link",
    ]
    assert (other / "lock").exists()
