"""Back ends, processors and main memory; threads of llama.cpp and of matrix multiplication; the device of torch.

Torch is imported only where a GPU may be found: its build says in a file whether it has kernels for one.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import platform
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bitladder.engine.native import backend, ggml, llama
from bitladder.errors import UsageError
from bitladder.files import Closing

if TYPE_CHECKING:
    import torch


CPU, GPU, IGPU, ACCEL = range(4)  # enum ggml_backend_dev_type
_PER_CPU = 512  # GGML_MAX_N_THREADS
# NumPy's wheels contain an OpenBLAS whose symbols have these names.
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")
Device = Literal["auto", "cpu", "cuda", "mps", "torch"]
GPUS = ("cuda", "mps")
# Of the memory that is free, for one piece of work. Torch's allocator and the library's kernels need the rest.
USABLE = 0.8


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


@functools.cache
def _built_for() -> tuple[str, ...]:
    """The GPUs that the installed torch has kernels for, without an import of torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ()
    version = pathlib.Path(spec.origin).with_name("version.py")
    text = version.read_text() if version.is_file() else ""
    cuda = re.search(r"^(cuda|hip)\b[^=]*=\s*['\"]", text, re.MULTILINE)  # ROCm's devices have the same name
    metal = platform.system() == "Darwin" and platform.machine() == "arm64"
    return (*(("cuda",) if cuda else ()), *(("mps",) if metal else ()))


def _found(name: str) -> bool:
    """Whether torch sees such a GPU."""
    if name not in _built_for():
        return False
    import torch

    return bool(torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available())


def torch_device(name: Device) -> str | None:
    """What computes: "cuda", "mps", "torch" (torch's kernels on the CPU), or None for the CPU's own kernels.

    Parameters:
        name: "auto" takes a GPU that torch sees, else the CPU.

    Raises:
        UsageError: torch does not see this GPU; the error says what to do.

    Example:
        >>> torch_device("cpu") is None
        True
    """
    if name == "auto":
        return next((gpu for gpu in GPUS if _found(gpu)), None)
    if name == "cpu":
        return None
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"--device {name} needs torch: pip install 'bitladder[torch]'")
    if name in GPUS and not _found(name):
        raise UsageError(f"--device {name}: {_why_not_found(name)}; --device cpu works without")
    return name


def _why_not_found(name: str) -> str:
    if name in _built_for():
        return "torch sees no such device on this machine"
    if name == "mps":
        return "only torch on an Apple machine with its own processor has this device"
    return "the installed torch is built for CPUs only; https://pytorch.org/get-started has the builds for GPUs"


def as_torch(name: str | None) -> "torch.device":
    """Torch's own object for what `torch_device` returned."""
    import torch

    return torch.device(name if name in GPUS else "cpu")


def device_key(name: Device) -> dict[str, Any]:
    """What the key of a result holds of the device that made it; nothing for the CPU's own kernels.

    A device that was named does more of the work than one that "auto" found.
    """
    device = torch_device(name)
    return {} if device is None else {"device": device, "named": name != "auto"}


def device_memory(name: str) -> int | None:
    """Bytes that one piece of work may take on a device; None if the system does not say.

    Parameters:
        name: what `torch_device` returned. Of "torch" it is main memory, of which Linux alone knows what is free.
    """
    import torch

    if name == "cuda":
        # What torch has set aside and does not use is free too.
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    elif name == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        meminfo = pathlib.Path("/proc/meminfo")
        available = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text()) if meminfo.is_file() else None
        if available is None:
            return None
        free = 1024 * int(available[1])
    return int(USABLE * max(free, 0))
