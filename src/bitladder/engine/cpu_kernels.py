"""The CPU's kernels: the special layouts of weights that work on this processor, and the speed of products by type."""

import contextlib
import ctypes
import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bitladder.engine.devices import CPU, cpu_function
from bitladder.engine.native import InitParams, backend, ggml, llama
from bitladder.engine.types import TensorType, all_types, quantize_rows, threads_available, type_by_name
from bitladder.errors import BitladderError

_AMX = b"AMX"
_WIDTH, _ROWS, _COLUMNS = 256, 64, 32
_TOLERANCE = 0.05  # of the largest value; rounding to 8 bits costs less than 0.01
_SECONDS = 60


@functools.cache
def extras_work() -> bool:
    """Whether models can be loaded with `use_extra_bufts`."""
    check = begin_check()
    if not isinstance(check, subprocess.Popen):
        return check
    try:
        return check.wait(_SECONDS) == 0
    except subprocess.TimeoutExpired:
        check.kill()
        check.wait()
        return False


@functools.cache
def begin_check() -> "subprocess.Popen[bytes] | bool":
    """Starts the process that `extras_work` waits for, so that other work can be done meanwhile.

    Without AMX, or where no process can be started, it is the answer.
    """
    if all(name != _AMX for name, _ in _extra_buffers()):
        return True
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", "bitladder.engine.cpu_kernels"]
    try:
        return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:
        return False


def _extra_buffers() -> Iterator[tuple[bytes, int]]:
    """The special buffer types: name and address of each."""
    backend()
    get_buffer_types = cpu_function(
        "ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
    )
    if get_buffer_types is None:
        return
    buffer_types = get_buffer_types(None)
    index = 0
    while buffer_types and buffer_types[index]:
        yield ggml.ggml_backend_buft_name(buffer_types[index]), buffer_types[index]
        index += 1


def _multiply(buffer_type: int) -> bool:
    """Whether a product with a Q8_0 weight in a buffer of this type is right."""
    generator = np.random.default_rng(0)
    weight, inputs = (generator.standard_normal((rows, _WIDTH), np.float32) for rows in (_ROWS, _COLUMNS))
    kind = type_by_name("q8_0")
    size = 16 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    special, plain = (ggml.ggml_init(InitParams(size, None, True)) for _ in range(2))
    a = ggml.ggml_new_tensor_2d(special, kind.id, _WIDTH, _ROWS)
    b = ggml.ggml_new_tensor_2d(plain, type_by_name("f32").id, _WIDTH, _COLUMNS)
    product = ggml.ggml_mul_mat(plain, a, b)
    cpu = ggml.ggml_backend_init_by_type(CPU, None)
    ggml.ggml_backend_alloc_ctx_tensors_from_buft(special, buffer_type)
    ggml.ggml_backend_alloc_ctx_tensors(plain, cpu)
    data = quantize_rows(weight, kind)
    ggml.ggml_backend_tensor_set(a, data.ctypes.data, 0, data.nbytes)
    ggml.ggml_backend_tensor_set(b, inputs.ctypes.data, 0, inputs.nbytes)
    graph = ggml.ggml_new_graph(plain)
    ggml.ggml_build_forward_expand(graph, product)
    status = ggml.ggml_backend_graph_compute(cpu, graph)
    computed = np.empty((_COLUMNS, _ROWS), np.float32)
    ggml.ggml_backend_tensor_get(product, computed.ctypes.data, 0, computed.nbytes)
    expected = inputs @ weight.T
    return status == 0 and bool(np.abs(computed - expected).max() < _TOLERANCE * np.abs(expected).max())


if __name__ == "__main__":
    sys.exit(not all(_multiply(address) for name, address in _extra_buffers() if name == _AMX))


ROW = 1 << 16  # weights: long enough that a call costs nothing, short enough that the vector stays in a cache
INPUTS = 512  # multiplied at once: the usual -ub
ROWS = 256  # so many that the matrix does not stay in a cache


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
    """The speed of matrix–vector products: the best of several passes over a matrix of random blocks, 16M weights.

    Parameters:
        kind: type of the matrix.
        threads: threads of the CPU; None uses all.
        seconds: time of all passes.

    Returns:
        Bytes of weights per second of all threads together; None if the CPU back end has no kernel for the type.

    Raises:
        BitladderError: the library has no CPU back end of its own.
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


def products_per_second(
    kind: TensorType, threads: int | None = None, seconds: float = 0.1, *, side: int = 1024
) -> float:
    """The speed of matrix products, as a text is read: of a matrix with 512 inputs at once.

    Each thread multiplies for itself, and its CPU time counts: other work on the machine does not change the result.

    Parameters:
        kind: type of the matrix.
        threads: threads of the CPU; None uses all.
        seconds: CPU time of a thread.
        side: rows and columns of the matrix.

    Returns:
        Operations (two for each weight and input) per second, of all threads together.
    """
    count = threads or threads_available()
    values = np.random.default_rng(0).standard_normal((side, side), np.float32)
    data = quantize_rows(values, kind, np.ones(side, np.float32))
    backend()
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(lambda _: _products(kind, data, values[:INPUTS], seconds), range(count)))


def _products(
    kind: TensorType, data: np.typing.NDArray[np.uint8], rows: np.typing.NDArray[np.float32], seconds: float
) -> float:
    """Operations per CPU second of this thread, the best of several products."""
    side, columns = len(data), len(rows)
    context = ggml.ggml_init(InitParams(16 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead(), None, True))
    cpu = ggml.ggml_backend_init_by_type(CPU, None)
    matrix = ggml.ggml_new_tensor_2d(context, kind.id, side, side)
    inputs = ggml.ggml_new_tensor_2d(context, 0, side, columns)  # F32
    product = ggml.ggml_mul_mat(context, matrix, inputs)
    buffer = ggml.ggml_backend_alloc_ctx_tensors(context, cpu)
    ggml.ggml_backend_tensor_set(matrix, data.ctypes.data, 0, data.nbytes)
    ggml.ggml_backend_tensor_set(inputs, rows.ctypes.data, 0, rows.nbytes)
    set_threads = cpu_function("ggml_backend_set_n_threads", None, ctypes.c_void_p, ctypes.c_int)
    if set_threads is not None:
        set_threads(cpu, 1)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, product)
    best, began = 0.0, time.thread_time()
    while time.thread_time() - began < seconds or not best:
        start = time.thread_time()
        ggml.ggml_backend_graph_compute(cpu, graph)
        best = max(best, 2 * side * side * columns / (time.thread_time() - start))
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_backend_free(cpu)
    ggml.ggml_free(context)
    return best


def input_type(kind: TensorType) -> TensorType | None:
    """The type to which the CPU's kernel of a type rounds its input; None if it takes floats, or is unknown."""
    try:
        traits = _traits(kind)
    except BitladderError:
        return None
    rounded_to = None if traits is None else all_types()[traits.vec_dot_type]
    return rounded_to if rounded_to is not None and rounded_to.quantized else None


def _as_type(vector: np.typing.NDArray[np.float32], kind: TensorType) -> np.typing.NDArray[Any]:
    """The vector in the type of the kernel's input."""
    if kind.name == "f32":
        return vector
    if kind.name in ("q8_K", "q8_1"):  # only the kernels quantize to these; the time does not depend on the values
        return np.zeros(kind.row_bytes(vector.shape[1]), np.uint8)
    return quantize_rows(vector, kind)


@functools.cache
def _traits(kind: TensorType) -> Any:
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        library = llama.load_shared_library("ggml-cpu", llama._base_path)
        if hasattr(library, "ggml_get_type_traits_cpu"):
            prototype: Any = ctypes.CFUNCTYPE(ctypes.POINTER(_Traits), ctypes.c_int)
            address = ctypes.cast(library.ggml_get_type_traits_cpu, ctypes.c_void_p).value
            traits = prototype(address)(kind.id).contents
            return traits if traits.vec_dot else None
    raise BitladderError("this build of llama.cpp has no CPU kernels of its own to time; use another --menu")
