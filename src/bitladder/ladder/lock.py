"""One run at a time in a directory."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

from bitladder.errors import BitladderError

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the directory's lock. The system gives it back when the process ends, however it ends.

    Raises BitladderError, with the number of the process that holds it, if another run is at work there.
    """
    descriptor = _open(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            # Nobody else can hold it now; a killed run leaves the file, which does no harm.
            (folder / NAME).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open(folder: pathlib.Path) -> int:
    """The lock file, opened and locked."""
    path = folder / NAME
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BitladderError(f"cannot write in {folder}: {error.strerror}") from error
        if not _take(descriptor):
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise BitladderError(f"another bitladder is at work in {folder} (process {holder}); wait until it is done")
        # The last holder may have removed the file after it was opened here: then the lock is on no name any more.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    if sys.platform == "win32":  # no advisory locks of this kind there
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks at all: better without one than not to run there.
        return True
    return True
