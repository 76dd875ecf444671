"""Installing models: all or nothing, once, and never in each other's way."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headrace.store import DownloadError, ModelError, installed, models_dir, remove
from headrace.store.home import home_dir, install


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def complete(directory: Path) -> bool:
    return (directory / "done").exists()


def build(directory: Path) -> None:
    (directory / "part").write_text("x")
    (directory / "done").write_text("x")


def traces() -> list[str]:
    """Everything under the models' directory but models and lock files."""
    return [p.name for p in models_dir().iterdir() if p.name.startswith(".") and p.suffix != ".lock"]


def test_home_is_the_users_cache_unless_said_otherwise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_dir() == home
    monkeypatch.delenv("HEADRACE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert home_dir() == Path("/somewhere/.cache/headrace")


def test_a_model_is_installed_once(home: Path) -> None:
    assert installed() == []
    calls: list[Path] = []
    for _ in range(2):
        directory = install("m", lambda d: (calls.append(d), build(d))[1], is_current=complete)
    assert directory == home / "models" / "m" and complete(directory) and len(calls) == 1
    assert installed() == ["m"] and traces() == []
    assert directory.stat().st_mode & 0o777 == 0o755


def test_a_failed_install_leaves_nothing(home: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "part").write_text("x")
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        install("m", fail, is_current=complete)
    assert installed() == [] and traces() == []


def test_a_failed_install_leaves_the_model_that_was_there() -> None:
    install("m", build, is_current=complete)
    (models_dir() / "m" / "note").write_text("old")

    def fail(directory: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install("m", fail, is_current=lambda directory: False)
    assert (models_dir() / "m" / "note").read_text() == "old" and traces() == []


def test_an_outdated_model_is_replaced_whole() -> None:
    install("m", build, is_current=complete)
    (models_dir() / "m" / "note").write_text("old")
    install("m", build, is_current=lambda directory: False)
    assert sorted(p.name for p in (models_dir() / "m").iterdir()) == ["done", "part"] and traces() == []


def test_a_full_disk_is_said_and_leaves_nothing() -> None:
    def fill(directory: Path) -> None:
        (directory / "part").write_text("x")
        with open("/dev/full", "wb", buffering=0) as full:  # fails as a full disk does
            full.write(b"x")

    with pytest.raises(DownloadError, match=r"no space to install 'm'.*HEADRACE_HOME"):
        install("m", fill, is_current=complete)
    assert installed() == [] and traces() == []


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot install 'm' in .*Not a directory"):
        install("m", build, is_current=complete)


def test_two_installs_at_once_build_once() -> None:
    inside, go_on, waited = threading.Event(), threading.Event(), threading.Event()
    builds: list[Path] = []

    def slow(directory: Path) -> None:
        builds.append(directory)
        inside.set()
        assert go_on.wait(20)
        build(directory)

    first = threading.Thread(target=lambda: install("m", slow, is_current=complete))
    first.start()
    assert inside.wait(20)
    second = threading.Thread(
        target=lambda: install("m", slow, is_current=complete, waiting=lambda: waited.set())
    )
    second.start()
    assert waited.wait(20)
    go_on.set()
    first.join(20)
    second.join(20)
    assert len(builds) == 1 and installed() == ["m"]


def test_a_killed_install_is_swept_up_by_the_next(home: Path) -> None:
    script = (
        "import sys, time\n"
        "from headrace.store.home import install\n"
        "def build(d):\n"
        "    (d / 'part').write_text('x'); print('inside', flush=True); time.sleep(60)\n"
        "install('m', build, is_current=lambda d: False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None and process.stdout.readline() == b"inside\n"
    assert len(traces()) == 1
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    assert installed() == []
    install("m", build, is_current=complete)
    assert installed() == ["m"] and traces() == []


def test_a_model_is_removed() -> None:
    install("m", build, is_current=complete)
    remove("m")
    assert installed() == [] and traces() == []
    with pytest.raises(ModelError, match=r"no model 'm'.*installed: none"):
        remove("m")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc", "a" * 129, "a\nb", "ü"])
def test_names_that_could_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        install(name, build, is_current=complete)
    with pytest.raises(ModelError, match="cannot be used"):
        remove(name)
