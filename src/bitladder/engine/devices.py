"""Back ends, processors and main memory; the threads of llama.cpp and of NumPy's matrix multiplication."""

import contextlib
import ctypes
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitladder.engine.native import backend, ggml, llama
from bitladder.files import Closing

CPU, GPU, IGPU, ACCEL = range(4)  # enum ggml_backend_dev_type
_PER_CPU = 512  # GGML_MAX_N_THREADS


def backend_names() -> str:
    """The back ends besides the CPU's, separated by commas, or "CPU", as llama-bench names them."""
    backend()
    registered = [ggml.ggml_backend_reg_get(index) for index in range(ggml.ggml_backend_reg_count())]
    names = [ggml.ggml_backend_reg_name(entry).decode() for entry in registered]
    return ",".join(name for name in names if name not in {"CPU", "RPC"}) or "CPU"


def processors(*kinds: int) -> str:
    """The names of the devices of some kinds, separated by commas; empty if there are none."""
    backend()
    names = [ggml.ggml_backend_dev_description(device) for device in _devices(kinds)]
    return ", ".join(name.decode("utf-8", "replace") for name in names)


def kernels() -> str:
    """The instruction sets that the library's kernels use, such as "CPU : AVX2 = 1 | FMA = 1"."""
    backend()
    return llama.llama_print_system_info().decode().strip(" |")  # type: ignore[no-any-return]


def _devices(kinds: tuple[int, ...]) -> list[Any]:
    devices = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    return [device for device in devices if ggml.ggml_backend_dev_type(device) in kinds]


def cpu_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the CPU back end that the common interface does not have, or None.

    Parameters:
        name: name of the function.
        result: ctypes type of its result.
        arguments: ctypes types of its arguments.
    """
    for device in _devices((CPU,)):
        address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_dev_backend_reg(device), name.encode())
        if address:
            return ctypes.CFUNCTYPE(result, *arguments)(address)
    return None


class _PoolParams(ctypes.Structure):
    """struct ggml_threadpool_params (ggml.h)."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _PER_CPU),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
        ("room", ctypes.c_char * 64),  # for fields of a later version
    )


class ThreadPool(Closing):
    """Threads of the CPU back end that stay for all computations, as in llama-bench and llama-server.

    A library without OpenMP, as on macOS, otherwise starts threads for each computation. Where the back end has no
    pools the `handle` is None, and attaching it changes nothing.
    """

    def __init__(self, threads: int) -> None:
        backend()
        self.handle: int | None = None
        params = _PoolParams()
        ggml.ggml_threadpool_params_init(ctypes.addressof(params), threads)
        make = cpu_function("ggml_threadpool_new", ctypes.c_void_p, ctypes.c_void_p)
        self._free = cpu_function("ggml_threadpool_free", None, ctypes.c_void_p)
        # If the number of threads is in its place, the structure has the declared layout.
        if make and self._free and params.n_threads == threads:
            self.handle = make(ctypes.addressof(params))

    def close(self) -> None:
        """Stops the threads."""
        if self.handle and self._free:
            self._free(self.handle)
            self.handle = None


def main_memory() -> int:
    """Bytes of main memory; 0 if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def give_back_memory() -> None:
    """Gives memory that was freed back to the system, where C's library would keep it for later (glibc does).

    It keeps what threads freed in pools of their own, where other threads find none of it: 1.8 GB after second moments
    by gradients of a 127M model.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of other systems
        ctypes.CDLL(None).malloc_trim(0)


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
