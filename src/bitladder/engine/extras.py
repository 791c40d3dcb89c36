"""Whether the library's special layouts of weights work on this processor.

A CPU back end built for Intel's AMX keeps some types in a layout for it. GCC before 11.5, 12.4 and 13.3 leaves most of
the tiles' configuration out of the program (bug 114098), so that the first multiplication ends the process. A small
multiplication is therefore tried in a process of its own, which runs this module.
"""

import ctypes
import functools
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from bitladder.engine.devices import CPU, cpu_function
from bitladder.engine.native import InitParams, backend, ggml
from bitladder.engine.types import quantize_rows, type_by_name

_AMX = b"AMX"
_WIDTH, _ROWS, _COLUMNS = 256, 64, 32
_TOLERANCE = 0.05  # of the largest value; rounding to 8 bits costs less than 0.01
_SECONDS = 60


@functools.cache
def extras_work() -> bool:
    """Whether models can be loaded with `use_extra_bufts`."""
    if all(name != _AMX for name, _ in _extra_buffers()):
        return True
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "bitladder.engine.extras"], capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return process.returncode == 0


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
