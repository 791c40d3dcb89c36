"""How many threads NumPy's matrix multiplication starts of its own."""

import contextlib
import ctypes
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

# NumPy's wheels carry an OpenBLAS with symbols renamed like this.
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


class _Users:
    """The number is the library's, for all threads: who comes first sets it, and who goes last puts it back."""

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
    """Inside the context a multiplication runs in the thread that calls it, if NumPy uses its own OpenBLAS.

    Work that is shared among threads already gains nothing from more of them, and OpenBLAS's wait for each other by
    spinning, which on a busy machine takes longer than the multiplication. With another BLAS nothing is changed.
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
