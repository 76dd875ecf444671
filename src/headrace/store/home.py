"""Where models live on this machine, and how one is put there.

A model is a directory `models/<name>/` under the home (`$HEADRACE_HOME`, else `~/.cache/headrace`). `install`
builds it in a hidden directory beside its final place and renames it there, so a reader sees all of a model
or nothing of it. One installer at a time holds the name's lock file; the kernel drops the lock with its
holder, and whoever takes it next sweeps what a killed holder left behind.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DownloadError, ModelError

LOCK_TIMEOUT_S = 3600.0
LOCK_POLL_S = 0.2
PROVENANCE = "headrace.json"
"""File in each installed model: where it came from and the format number of the import that wrote it."""

IMPORT_FORMAT = 1
"""Counts up when an import would write something else, so that older ones are made again."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def home_dir() -> Path:
    """Directory of everything Headrace keeps between runs."""
    configured = os.environ.get("HEADRACE_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "headrace"


def models_dir() -> Path:
    """Directory with one folder per installed model."""
    return home_dir() / "models"


def check_name(name: str) -> str:
    """`name` when it can name an installed model: one path component, no leading dot. Raises `ModelError`."""
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"model name {name!r} cannot be used: take 1 to 128 letters, digits, '.', '_', '+' or '-', "
            "starting with a letter or a digit"
        )
    return name


def provenance(directory: Path) -> dict[str, Any] | None:
    """What `install` recorded in `directory`, or None for a directory that it did not write."""
    try:
        record = json.loads((directory / PROVENANCE).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def installed() -> list[str]:
    """Names of the models under the home, sorted."""
    try:
        entries = sorted(entry.name for entry in models_dir().iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    return [name for name in entries if _NAME.fullmatch(name)]


def install(
    name: str,
    build: Callable[[Path], None],
    *,
    is_current: Callable[[Path], bool],
    waiting: Callable[[], None] = lambda: None,
) -> Path:
    """Make `models/<name>/` with `build`, unless `is_current` says the one there will do. Returns its path.

    `build` fills the empty directory it is given. If it raises, nothing of it remains and a model that was
    there before stays. `waiting` is called once if another process is installing the same name. A full disk
    becomes a `DownloadError`.
    """
    target = models_dir() / check_name(name)
    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        with _locked(name, waiting):
            if target.is_dir() and is_current(target):
                return target
            for stale in models_dir().glob(f".{name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=models_dir()))
            try:
                build(partial)
                _sync(partial)
                partial.chmod(0o755)
                _replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise _storage_error(error, target) from error
    return target


def remove(name: str) -> None:
    """Delete an installed model. Raises `ModelError` when there is none of that name."""
    target = models_dir() / check_name(name)
    if not target.is_dir():
        known = ", ".join(installed()) or "none"
        raise ModelError(f"no model {name!r} under {models_dir()}; installed: {known}")
    with _locked(name, lambda: None):
        # Renamed first, so that no reader finds half a model under the name.
        doomed = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=models_dir()))
        target.rename(doomed / name)
        shutil.rmtree(doomed)


@contextmanager
def _locked(name: str, waiting: Callable[[], None]) -> Iterator[None]:
    path = models_dir() / f".{name}.lock"
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    waiting()
                    told = True
            if time.monotonic() > deadline:
                raise ModelError(
                    f"another process has been installing {name!r} for {LOCK_TIMEOUT_S:.0f} s "
                    f"(it holds {path}); end it and try again"
                )
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    """Move `partial` to `target`, out of the way of which an older directory is moved first."""
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    target.rename(old / "old")
    try:
        partial.rename(target)
    except OSError:
        (old / "old").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Put the files on the disk before the rename that makes them visible: a power cut must not leave
    holes."""
    for path in [*(p for p in directory.rglob("*") if p.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _storage_error(error: OSError, target: Path) -> ModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next((p for p in target.parents if p.exists()), Path("/"))
        free = shutil.disk_usage(parent).free
        return DownloadError(
            f"no space to install {target.name!r}: {free / 1e6:.0f} MB are free under {parent}; "
            "free some, or set HEADRACE_HOME to a larger disk"
        )
    return ModelError(f"cannot install {target.name!r} in {target.parent}: {error.strerror or error}")
