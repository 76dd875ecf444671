"""Memory that another process of the same user can map, for bytes too many to be sent between the two.

In: a size. Out: memory, and a path by which it is opened while the process that made it lives. It has no name
in any file system: the kernel frees it when the last of those who hold it has ended, however that was, so
nothing is left behind. It must not know what the bytes are for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading

_NAME = "headrace"
_LINK = f"/memfd:{_NAME} (deleted)"
"""What such memory is called under /proc."""

_MADV_POPULATE_WRITE = 23
"""Of Linux 5.14 and later (madvise(2)); Python's mmap does not know it yet."""

_PIECE_BYTES = 4 << 20
"""Pages are taken so many at a time: `close` waits for no more than this."""

_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


class SharedMemoryError(OSError):
    """There is no such memory; the text says why."""


class MappedMemory:
    """Memory of this and another process. `buffer` is its bytes, page-aligned and writable.

    They stay mapped until `close` was called and the last view or tensor over `buffer` is gone. All pages are
    taken from the system by a thread in the background, from the first on: a page that is touched before it
    was taken costs a fault of its own, which can be several times as long as what is written to it takes.
    """

    def __init__(self, fd: int, size: int) -> None:
        try:
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
        except OSError as error:
            raise SharedMemoryError(
                f"cannot map {size} bytes of shared memory: {error.strerror or error}"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Refused by a system built without huge pages, and mostly without effect (see docs/cpu.md).
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(memory)
        self._closed = threading.Event()
        self._taking = threading.Thread(target=_take_pages, args=(memory, self._closed), daemon=True)
        self._taking.start()

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def close(self) -> None:
        """Let go of the memory; `buffer` is empty from now on. Idempotent."""
        self._closed.set()
        self._taking.join()
        self.buffer = memoryview(b"")


class SharedMemory(MappedMemory):
    """Memory made by this process: zeros.

    path: where `open_shared_memory` finds it, in a process of the same user, until this process ends or
          closes it. Who has it open then keeps it: bytes may go on moving while and after this process ends.
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes. Raises SharedMemoryError where the system has no such memory."""
        if size < 1:
            raise ValueError(f"shared memory must have at least 1 byte, got {size}")
        self._fd = _create(size)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            super().__init__(self._fd, size)
        except BaseException:
            self._close_fd()
            raise

    def close(self) -> None:
        super().close()
        self._close_fd()

    def __del__(self) -> None:
        if hasattr(self, "_taking"):  # else it was never mapped
            self.close()

    def _close_fd(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)


def _take_pages(memory: mmap.mmap, closed: threading.Event) -> None:
    """Have all pages ready in this process; what the system refuses is taken when it is touched."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    start = ctypes.c_char.from_buffer(memory)
    for offset in range(0, len(memory), _PIECE_BYTES):
        if madvise is None or closed.is_set():
            return
        size = min(_PIECE_BYTES, len(memory) - offset)
        piece = ctypes.c_void_p(ctypes.addressof(start) + offset)
        if madvise(piece, ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
            return


def open_shared_memory(path: str, size: int) -> MappedMemory:
    """The memory that another process made, by its `SharedMemory.path` and its size in bytes.

    Raises SharedMemoryError when that process has ended, or when what is there is not such memory of this
    size: the number of a process that has ended can be another's by now.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SharedMemoryError(
            f"cannot open shared memory at {path}: {error.strerror or error}; the process that made it may "
            "have ended, or be another user's"
        ) from error
    try:
        found, link = os.fstat(fd).st_size, os.readlink(f"/proc/self/fd/{fd}")
        if link != _LINK or found != size:
            raise SharedMemoryError(
                f"{path} is {link!r} of {found} bytes, not shared memory of {size}; the process that made "
                "that has ended"
            )
        return MappedMemory(fd, size)
    finally:
        os.close(fd)


def _create(size: int) -> int:
    """A file in memory of a fixed size, that only this user may open."""
    if not hasattr(os, "memfd_create"):
        raise SharedMemoryError(
            f"memory that another process can map needs memfd_create, which Linux has and {sys.platform} "
            "does not"
        )
    import fcntl

    try:
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise SharedMemoryError(
            f"cannot make memory that another process can map: {error.strerror or error}"
        ) from error
    try:
        os.fchmod(fd, 0o600)
        os.truncate(fd, size)
        # Whoever maps it may rely on its size: memory that shrinks under a reader ends the reader.
        for name in _SEALS:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, getattr(fcntl, name))
    except OSError as error:
        os.close(fd)
        raise SharedMemoryError(
            f"cannot make {size} bytes of memory that another process can map: {error.strerror or error}"
        ) from error
    return fd
