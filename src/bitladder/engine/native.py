"""The native library, loaded on first use: functions, structures, the ABI check, and the library's log.

`llama_cpp`, a module of ctypes declarations, covers libllama. The ggml functions that it lacks are declared here from
ggml.h. All declarations are checked against the loaded library before they are used.
"""

import collections
import contextlib
import ctypes
import functools
import importlib.metadata
import sys
import threading
from collections.abc import Iterator
from typing import Any

from bitladder.engine.deaths import note_assertions
from bitladder.errors import BitladderError

MINIMUM = (0, 3, 36)


def _import_bindings() -> Any:
    try:
        version = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        raise BitladderError("llama-cpp-python is not installed: pip install 'llama-cpp-python>=0.3.36'") from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM:
        raise BitladderError(f"llama-cpp-python {version} is too old: pip install -U 'llama-cpp-python>=0.3.36'")
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise BitladderError(
            f"llama-cpp-python {version} does not load ({error}); reinstall it: "
            "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
        ) from error
    return llama_cpp


class Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h)."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.c_void_p * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h)."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ggml_set_abort_callback": ([ctypes.c_void_p], ctypes.c_void_p),
    "ggml_version": ([], ctypes.c_char_p),
    "ggml_commit": ([], ctypes.c_char_p),
    "ggml_type_name": ([ctypes.c_int], ctypes.c_char_p),
    "ggml_op_name": ([ctypes.c_int], ctypes.c_char_p),
    "ggml_get_type_traits": ([ctypes.c_int], ctypes.POINTER(TypeTraits)),
    "ggml_row_size": ([ctypes.c_int, ctypes.c_int64], ctypes.c_size_t),
    "ggml_quantize_init": ([ctypes.c_int], None),
    "ggml_quantize_requires_imatrix": ([ctypes.c_int], ctypes.c_bool),
    "ggml_quantize_chunk": (
        [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ],
        ctypes.c_size_t,
    ),
    "ggml_validate_row_data": ([ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_bool),
    "ggml_backend_buffer_is_host": ([ctypes.c_void_p], ctypes.c_bool),
    "ggml_backend_tensor_get": ([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
    "ggml_backend_tensor_set": ([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
    "ggml_backend_reg_count": ([], ctypes.c_size_t),
    "ggml_backend_reg_get": ([ctypes.c_size_t], ctypes.c_void_p),
    "ggml_backend_reg_name": ([ctypes.c_void_p], ctypes.c_char_p),
    "ggml_backend_reg_get_proc_address": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p),
    "ggml_backend_dev_count": ([], ctypes.c_size_t),
    "ggml_backend_dev_get": ([ctypes.c_size_t], ctypes.c_void_p),
    "ggml_backend_dev_type": ([ctypes.c_void_p], ctypes.c_int),
    "ggml_backend_dev_description": ([ctypes.c_void_p], ctypes.c_char_p),
    "ggml_backend_dev_backend_reg": ([ctypes.c_void_p], ctypes.c_void_p),
    "ggml_threadpool_params_init": ([ctypes.c_void_p, ctypes.c_int], None),
    "llama_attach_threadpool": ([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p], None),  # not in llama_cpp either
    "ggml_init": ([InitParams], ctypes.c_void_p),
    "ggml_free": ([ctypes.c_void_p], None),
    "ggml_new_tensor_2d": ([ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64], ctypes.c_void_p),
    "ggml_set_name": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p),
    "ggml_mul_mat": ([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p),
    "ggml_tensor_overhead": ([], ctypes.c_size_t),
    "ggml_graph_overhead": ([], ctypes.c_size_t),
    "ggml_new_graph": ([ctypes.c_void_p], ctypes.c_void_p),
    "ggml_build_forward_expand": ([ctypes.c_void_p, ctypes.c_void_p], None),
    "ggml_backend_init_by_type": ([ctypes.c_int, ctypes.c_char_p], ctypes.c_void_p),
    "ggml_backend_free": ([ctypes.c_void_p], None),
    "ggml_backend_buffer_free": ([ctypes.c_void_p], None),
    "ggml_backend_graph_compute": ([ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int),
    "ggml_backend_alloc_ctx_tensors": ([ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": ([ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p),
    "ggml_backend_buft_name": ([ctypes.c_void_p], ctypes.c_char_p),
}


def _declare(llama: Any) -> Any:
    """The ggml functions. On Windows libllama does not give the symbols that it links: ggml's files are opened too."""
    libraries = [llama._lib]
    for part in ("ggml-base", "ggml"):
        with contextlib.suppress(FileNotFoundError, RuntimeError):
            libraries.append(llama.load_shared_library(part, llama._base_path))
    functions: Any = type("ggml", (), {})
    for name, (arguments, result) in _SIGNATURES.items():
        function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
        if function is None:
            raise BitladderError(
                f"the llama.cpp library in {llama._base_path} has no function {name}: it does not match "
                "llama-cpp-python; reinstall with pip install --force-reinstall llama-cpp-python"
            )
        # A new prototype leaves llama_cpp's declaration of the same symbol as it is.
        pointer = ctypes.cast(function, ctypes.c_void_p).value or 0
        setattr(functions, name, staticmethod(ctypes.CFUNCTYPE(result, *arguments)(pointer)))
    functions.MUL_MAT = next(i for i in range(200) if functions.ggml_op_name(i) == b"MUL_MAT")
    functions.MUL_MAT_ID = functions.MUL_MAT + 1
    functions.to_float = _vector_converters(llama, "ggml_cpu_{}_to_fp32")
    functions.from_float = _vector_converters(llama, "ggml_cpu_fp32_to_{}")
    return functions


def _vector_converters(llama: Any, form: str) -> dict[int, Any]:
    """The CPU back end's conversions of F16 and BF16, by type number; empty if it is not a library of its own.

    They take a fraction of the time of the portable conversions, with the same results for all numbers that are finite.
    """
    converters: dict[int, Any] = {}
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        library = llama.load_shared_library("ggml-cpu", llama._base_path)
        for number, kind in ((1, "fp16"), (30, "bf16")):  # F16, BF16
            if hasattr(library, form.format(kind)):
                prototype: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
                pointer = ctypes.cast(getattr(library, form.format(kind)), ctypes.c_void_p).value
                converters[number] = prototype(pointer)
    return converters


_lock = threading.RLock()
_opened: dict[str, Any] = {}


def _open() -> dict[str, Any]:
    """The library, loaded and checked once: llama_cpp's module, and the functions declared here."""
    with _lock:
        if not _opened:
            bindings = _import_bindings()
            _opened.update(llama=bindings, ggml=_declare(bindings))
            note_assertions(_opened["ggml"].ggml_set_abort_callback)
            try:
                install_log()
                check_abi()
            except BaseException:
                _opened.clear()
                raise
        return _opened


class _Library:
    """Functions and constants of the library, which is loaded when the first of them is used.

    Importing bitladder loads nothing native, so that `--help` is quick and options can be used without the library.
    """

    def __init__(self, part: str) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(_open()[self._part], name)
        return value

    def __dir__(self) -> list[str]:
        return dir(_open()[self._part])


llama: Any = _Library("llama")
ggml: Any = _Library("ggml")


def check_abi() -> None:
    """Raises BitladderError if structures or constants differ from the library's.

    A tensor that the library makes is read through our layout of ggml_tensor. The default parameters are read through
    llama_cpp's structures. Their last fields have known values only if every field before them has its size.
    """
    problems = []
    context = ggml.ggml_init(InitParams(1 << 16, None, True))
    first = ggml.ggml_new_tensor_2d(context, 0, 64, 5)
    second = ggml.ggml_new_tensor_2d(context, 0, 64, 7)
    ggml.ggml_set_name(first, b"abi.weight")
    product = Tensor.from_address(ggml.ggml_mul_mat(context, first, second))
    weight = Tensor.from_address(first)
    if (weight.type, tuple(weight.ne), tuple(weight.nb)[:2], weight.name) != (
        0,
        (64, 5, 1, 1),
        (4, 256),
        b"abi.weight",
    ):
        problems.append("ggml_tensor")
    if product.op != ggml.MUL_MAT or tuple(product.src)[:2] != (first, second) or tuple(product.ne)[:2] != (5, 7):
        problems.append("ggml_tensor.src")
    ggml.ggml_free(context)
    if ggml.ggml_op_name(ggml.MUL_MAT_ID) != b"MUL_MAT_ID":
        problems.append("ggml_op")
    traits = ggml.ggml_get_type_traits(1).contents
    if (traits.type_name, traits.blck_size, traits.type_size, traits.is_quantized) != (b"f16", 1, 2, False):
        problems.append("ggml_type_traits")
    quantize = llama.llama_model_quantize_default_params()
    if (quantize.token_embedding_type, quantize.max_buf_size) != (
        llama.GGML_TYPE_COUNT,
        8 << 30,
    ) or quantize.prune_layers:
        problems.append("llama_model_quantize_params")
    params = llama.llama_context_default_params()
    if (params.n_ctx, params.n_ubatch, params.type_k, params.no_perf, params.n_samplers) != (512, 512, 1, True, 0):
        problems.append("llama_context_params")
    model = llama.llama_model_default_params()
    if not model.use_extra_bufts or model.vocab_only or model.no_alloc or model.kv_overrides:
        problems.append("llama_model_params")
    if problems:
        raise BitladderError(
            f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')} and the library in {llama._base_path} "
            f"disagree on {', '.join(problems)}; reinstall with pip install --force-reinstall llama-cpp-python"
        )


DEBUG, WARNING, ERROR, CONTINUATION = 1, 3, 4, 5  # ggml_log_level in ggml.h


class NativeLog:
    """The log of the library: kept for error messages, and shown where `verbose` is set."""

    def __init__(self) -> None:
        self.lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=2000)
        self.verbose = False
        self._taps: list[tuple[int, list[str]]] = []  # the thread that each listens to
        self._level = 0
        self._lock = threading.Lock()

    def receive(self, level: int, text: bytes, _data: Any) -> None:
        """The callback. Levels: 0 none, 1 debug, 2 info, 3 warning, 4 error, 5 continuation (ggml.h)."""
        decoded = text.decode("utf-8", "replace")
        with self._lock:
            self._level = self._level if level == CONTINUATION else level
            self.lines.append((self._level, decoded))
            for thread, pieces in self._taps:
                if thread == threading.get_ident():
                    pieces.append(decoded)
        if self.verbose and self._level != DEBUG:
            sys.stderr.write(decoded)

    @contextlib.contextmanager
    def tapped(self) -> Iterator[list[str]]:
        """Yields a list that collects what the calling thread logs inside the context, in pieces of lines.

        Pieces of other threads would lie in the middle of its lines.
        """
        install_log()  # another user of the library in this process can have replaced the callback
        pieces: list[str] = []
        tap = threading.get_ident(), pieces
        self._taps = [*self._taps, tap]
        try:
            yield pieces
        finally:
            self._taps = [other for other in self._taps if other is not tap]

    def last_error(self) -> str:
        """The last two errors in one line; without errors, the last warnings; empty without both."""
        for searched in (ERROR, WARNING):
            lines = [text.strip() for level, text in self.lines if level == searched and text.strip(" \n=")]
            if lines:
                return "; ".join(lines[-2:])
        return ""


log = NativeLog()


@functools.cache
def _callback() -> Any:
    return llama.llama_log_callback(log.receive)


def install_log() -> None:
    """Makes the library log to `log`."""
    llama.llama_log_set(_callback(), ctypes.c_void_p(0))


@functools.cache
def backend() -> None:
    """Initializes the back ends once."""
    llama.llama_backend_init()


def library() -> str:
    """The library's commit as it stands in keys, such as "llama.cpp 1234abc"."""
    return f"llama.cpp {versions()['llama_cpp_commit']}"


@functools.cache
def versions() -> dict[str, str]:
    """The versions on which a figure depends: bitladder, llama-cpp-python, and the library's commit and version."""
    return {
        "bitladder": importlib.metadata.version("bitladder"),
        "llama_cpp_python": importlib.metadata.version("llama_cpp_python"),
        "llama_cpp_commit": ggml.ggml_commit().decode(),
        "ggml": ggml.ggml_version().decode(),
    }
