"""How fast this machine's CPU multiplies a matrix of each type with a vector: what generating a token mostly does."""

import contextlib
import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bitladder.engine.native import llama
from bitladder.engine.types import TensorType, all_types, quantize_rows, threads_available
from bitladder.errors import BitladderError

ROW = 1 << 16  # weights: one call takes long enough that calling costs nothing, and the vector stays in a cache
ROWS = 256  # so that the matrix does not stay in one


class _Traits(ctypes.Structure):
    """struct ggml_type_traits_cpu (ggml-cpu.h)."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def bytes_per_second(kind: TensorType, threads: int | None = None, seconds: float = 0.1) -> float | None:
    """Bytes of weights of a type that matrix–vector products go through in a second, with all threads.

    The best of several passes over a matrix of random blocks of some 16M weights. None if the CPU back end has no
    kernel for the type. Raises BitladderError if there is no CPU back end to ask.
    """
    traits = _traits(kind)
    if traits is None or ROW % kind.block:
        return None
    generator = np.random.default_rng(0)
    matrix = generator.integers(0, 256, (ROWS, kind.row_bytes(ROW)), np.uint8)
    vector = generator.standard_normal((1, ROW)).astype(np.float32)
    data = _as_type(vector, all_types()[traits.vec_dot_type])
    count = threads or threads_available()

    def work(thread: int) -> None:
        result = ctypes.c_float()
        for row in matrix[thread::count]:
            traits.vec_dot(ROW, ctypes.addressof(result), 0, row.ctypes.data, 0, data.ctypes.data, 0, 1)

    best, began = 0.0, time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        while time.perf_counter() - began < seconds or not best:
            start = time.perf_counter()
            list(pool.map(work, range(count)))
            best = max(best, matrix.nbytes / (time.perf_counter() - start))
    return best


def input_type(kind: TensorType) -> TensorType | None:
    """The type that the CPU's kernel of a type rounds its input to; None if it takes floats, or is not known."""
    try:
        traits = _traits(kind)
    except BitladderError:
        return None
    found = None if traits is None else all_types()[traits.vec_dot_type]
    return found if found is not None and found.quantized else None


def _as_type(vector: np.typing.NDArray[np.float32], kind: TensorType) -> np.typing.NDArray[Any]:
    """The vector as the kernel wants it."""
    if kind.name == "f32":
        return vector
    if kind.name == "q8_K":  # the library quantizes to it only inside of its kernels; the time does not depend on it
        return np.zeros(kind.row_bytes(vector.shape[1]), np.uint8)
    if kind.name == "q8_1":
        return np.zeros(kind.row_bytes(vector.shape[1]), np.uint8)
    return quantize_rows(vector, kind)


def _traits(kind: TensorType) -> Any:
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        library = llama.load_shared_library("ggml-cpu", llama._base_path)
        if hasattr(library, "ggml_get_type_traits_cpu"):
            prototype: Any = ctypes.CFUNCTYPE(ctypes.POINTER(_Traits), ctypes.c_int)
            address = ctypes.cast(library.ggml_get_type_traits_cpu, ctypes.c_void_p).value
            found = prototype(address)(kind.id).contents
            return found if found.vec_dot else None
    raise BitladderError("this build of llama.cpp has no CPU kernels of its own to time; use another --menu")
