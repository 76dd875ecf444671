"""A directory for the life of one process: only this user can enter it, and it goes when its owner goes.

In: a prefix. Out: a path. Whoever makes one first removes those of the same prefix whose owners ended without
removing theirs, as a killed process does. Its owner holds a lock on a file in it, which the kernel releases
however the owner ends; so a lock that can be had tells of an owner that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_LONGEST_PARENT = 60
"""Characters of a path that leave room for a socket's name in the 107 that the system allows."""

_LOCK = "lock"


class PrivateDirectory:
    """Made at once; removed by `remove`, or by the next process that makes one after this one ended."""

    def __init__(self, prefix: str) -> None:
        """Raises OSError where no directory can be made."""
        where = tempfile.gettempdir()
        parent = Path(where if len(where) <= _LONGEST_PARENT else "/tmp")
        _sweep(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # It gets its name when it is locked: whoever finds a lock that is free may rely on it.
        unnamed = self.path / f"{_LOCK}.new"
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(parent: Path, prefix: str) -> None:
    """Remove this user's directories of `prefix` whose owners are gone."""
    for directory in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # no lock yet, another's, or gone meanwhile: not ours to remove
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
