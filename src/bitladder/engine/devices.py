"""What the library computes on: back ends, processors, and a pool of CPU threads."""

import ctypes
from typing import Any

from bitladder.closing import Closing
from bitladder.engine.native import backend, ggml, llama

CPU, GPU, IGPU, ACCEL = range(4)  # enum ggml_backend_dev_type
_PER_CPU = 512  # GGML_MAX_N_THREADS


def backend_names() -> str:
    """The library's back ends besides the CPU's, separated by commas, or "CPU"; as llama-bench names them."""
    backend()
    registered = [ggml.ggml_backend_reg_get(index) for index in range(ggml.ggml_backend_reg_count())]
    names = [ggml.ggml_backend_reg_name(one).decode() for one in registered]
    return ",".join(name for name in names if name not in {"CPU", "RPC"}) or "CPU"


def processors(*kinds: int) -> str:
    """What the devices of some kinds call themselves, separated by commas; empty if there are none."""
    backend()
    return ", ".join(ggml.ggml_backend_dev_description(one).decode("utf-8", "replace") for one in _devices(kinds))


def kernels() -> str:
    """The instruction sets that the library's kernels use, such as "CPU : AVX2 = 1 | FMA = 1"."""
    backend()
    return llama.llama_print_system_info().decode().strip(" |")  # type: ignore[no-any-return]


def _devices(kinds: tuple[int, ...]) -> list[Any]:
    found = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    return [device for device in found if ggml.ggml_backend_dev_type(device) in kinds]


def cpu_function(name: str, result: Any, argument: Any) -> Any:
    """A function that the CPU back end offers beyond the common interface, or None."""
    for device in _devices((CPU,)):
        address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_dev_backend_reg(device), name.encode())
        if address:
            return ctypes.CFUNCTYPE(result, argument)(address)
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
        ("room", ctypes.c_char * 64),  # should the structure grow
    )


class ThreadPool(Closing):
    """Threads of the CPU back end that wait for the next computation instead of being made for each.

    llama-bench and llama-server compute so. It matters where the library is built without OpenMP, as on macOS. Where
    the back end offers no pools the `handle` is None, and attaching it changes nothing.
    """

    def __init__(self, threads: int) -> None:
        backend()
        self.handle: int | None = None
        params = _PoolParams()
        ggml.ggml_threadpool_params_init(ctypes.addressof(params), threads)
        make = cpu_function("ggml_threadpool_new", ctypes.c_void_p, ctypes.c_void_p)
        self._free = cpu_function("ggml_threadpool_free", None, ctypes.c_void_p)
        # The structure's layout is as declared if the number of threads is where it should be.
        if make and self._free and params.n_threads == threads:
            self.handle = make(ctypes.addressof(params))

    def close(self) -> None:
        """Stop the threads."""
        if self.handle and self._free:
            self._free(self.handle)
            self.handle = None
