"""The number of threads of NumPy's matrix multiplication."""

import contextlib
import ctypes
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

# NumPy's wheels contain an OpenBLAS whose symbols have these names.
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


class _Users:
    """Users of the setting, which the library has once for all threads: the first sets it, the last resets it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.before = 1


_USERS = _Users()


@functools.cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    package = pathlib.Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(str(path))
                for name in _NAMES:
                    if hasattr(library, name.format("set")):
                        return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Inside the context, a multiplication runs in the thread that calls it, if NumPy uses its own OpenBLAS.

    Work that several threads share already gains nothing from more threads. OpenBLAS's threads wait for one another by
    spinning, which takes longer than the multiplication on a busy machine. With another BLAS nothing changes.
    """
    controls = _controls()
    if controls is None:
        yield
        return
    get, put = controls
    with _USERS.lock:
        if _USERS.count == 0:
            _USERS.before = get()
            put(1)
        _USERS.count += 1
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.count -= 1
            if _USERS.count == 0:
                put(_USERS.before)
