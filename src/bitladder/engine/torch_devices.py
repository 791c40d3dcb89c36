"""The device on which torch computes: which one a name means, whether it is there, how much memory is free on it.

Torch is imported only where a GPU may be found: its build says in a file whether it has kernels for one.
"""

import functools
import importlib.util
import pathlib
import platform
import re
from typing import TYPE_CHECKING, Any, Literal

from bitladder.errors import UsageError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps", "torch"]
GPUS = ("cuda", "mps")
# Of the memory that is free, for one piece of work. Torch's allocator and the library's kernels need the rest.
USABLE = 0.8


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
