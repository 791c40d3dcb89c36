"""The library's tensor types, its kernels that quantize and dequantize rows, and rows that a type cannot hold."""

import dataclasses
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import ggml, llama
from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
# Squared error of a row, as a share of its squares. Where nothing underflows, F16 has 1e-7 and BF16 4e-6.
_MOST_LOST = 1e-4
_SIGNLESS = np.uint16(0x7FFF)
_INFINITE = {"f16": 0x7C00, "bf16": 0x7F80}  # bits without the sign, from which a number is not finite


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A ggml type.

    Parameters:
        id: its number (ggml_type).
        name: its name, such as "q4_K".
        block: weights of a block.
        block_bytes: bytes of a block.
        quantized: whether it is a quantized type.
    """

    id: int
    name: str
    block: int
    block_bytes: int
    quantized: bool

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights. Raises BitladderError if blocks do not divide the row."""
        if width % self.block:
            raise BitladderError(f"a row of {width} weights cannot be stored as {self.name} (blocks of {self.block})")
        return width // self.block * self.block_bytes


@functools.cache
def all_types() -> dict[int, TensorType]:
    """All types of the library by number."""
    types = {}
    for number in range(llama.GGML_TYPE_COUNT):
        traits = ggml.ggml_get_type_traits(number).contents
        if traits.type_name and traits.blck_size > 0 and traits.type_size > 0:
            name = traits.type_name.decode()
            types[number] = TensorType(number, name, traits.blck_size, traits.type_size, traits.is_quantized)
    return types


@functools.cache
def type_by_name(name: str) -> TensorType:
    """The type of a name in any case ("q4_K", "Q4_K"). Raises UsageError that names the closest one, or lists all."""
    for candidate in all_types().values():
        if candidate.name.lower() == name.lower():
            return candidate
    known = [kind.name for kind in all_types().values()]
    raise UsageError(f"unknown tensor type {name!r}{did_you_mean(name, known, 'the library knows')}")


def threads_available() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RowKernels:
    """The library's row kernels, run by a pool of threads. The kernels release Python's lock.

    Rows are independent in every type, so bytes do not depend on the number of threads.
    """

    # Large enough that the overhead of a call is small, small enough that threads finish together.
    WEIGHTS_PER_CALL = 1 << 17

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or threads_available()
        self._pool = ThreadPoolExecutor(self.threads)

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown()

    def _spans(self, rows: int, width: int) -> list[tuple[int, int]]:
        step = max(1, min(self.WEIGHTS_PER_CALL // width, -(-rows // self.threads)))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def quantize(self, weights: Floats, kind: TensorType, importance: Floats | None = None) -> Bytes:
        """Quantizes rows.

        Parameters:
            weights: float32, shape [rows, width].
            kind: the type.
            importance: mean squared input of each column, float32, shape [width]; None weights all columns alike.

        Returns:
            uint8, shape [rows, row bytes].

        Raises:
            BitladderError: the width does not fit, the type needs importance, or the result is not finite.
        """
        width = weights.shape[1]
        out = np.empty((len(weights), kind.row_bytes(width)), np.uint8)

        def work(span: tuple[int, int]) -> None:
            part = slice(*span)
            out[part] = quantize_rows(weights[part], kind, importance)

        list(self._pool.map(work, self._spans(len(weights), width)))
        return out

    def dequantize(self, data: Bytes, kind: TensorType, width: int) -> Floats:
        """Expands rows: uint8, shape [rows, row bytes] or flat, to float32, shape [rows, width]."""
        row_bytes = kind.row_bytes(width)
        data = np.ascontiguousarray(data).reshape(-1, row_bytes)
        rows = len(data)
        if kind.name == "f32":
            return data.view(np.float32).reshape(rows, width)
        out = np.empty((rows, width), np.float32)

        def work(span: tuple[int, int]) -> None:
            start, stop = span
            dequantize_into(data[start:stop], kind, out[start:stop])

        list(self._pool.map(work, self._spans(rows, width)))
        return out


def dequantize_into(data: Bytes, kind: TensorType, out: Floats) -> None:
    """Expands rows in the calling thread.

    Parameters:
        data: uint8, shape [rows, row bytes], contiguous.
        kind: the type.
        out: the result, float32, shape [rows, width], contiguous.

    Raises:
        BitladderError: the library cannot expand the type.
    """
    fits = data.nbytes == kind.row_bytes(out.shape[1]) * len(out)
    if not (fits and data.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("data and out do not fit together")
    if kind.name == "f32":
        out[:] = data.view(np.float32).reshape(out.shape)
        return
    to_float = ggml.to_float.get(kind.id) or ggml.ggml_get_type_traits(kind.id).contents.to_float
    if not to_float:
        raise BitladderError(f"the library cannot expand {kind.name}")
    to_float(data.ctypes.data, out.ctypes.data, out.size)


def dequantize_rows(data: Bytes, kind: TensorType, width: int) -> Floats:
    """Expands rows in the calling thread, uint8 [rows, row bytes] to float32 [rows, width]; see `dequantize_into`."""
    out = np.empty((len(data), width), np.float32)
    dequantize_into(data, kind, out)
    return out


def quantize_rows(weights: Floats, kind: TensorType, importance: Floats | None = None) -> Bytes:
    """Quantizes rows in the calling thread; see `RowKernels.quantize`."""
    rows, width = weights.shape
    out = np.empty((rows, kind.row_bytes(width)), np.uint8)
    if importance is None and ggml.ggml_quantize_requires_imatrix(kind.id):
        raise BitladderError(f"{kind.name} needs an importance matrix (--imatrix)")
    weights = np.ascontiguousarray(weights, np.float32)
    pointer = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (width,):
            raise BitladderError(
                f"importance has {number_of(importance.size, 'entry', 'entries')} for rows of {width} weights"
            )
        pointer = importance.ctypes.data
    if convert := ggml.from_float.get(kind.id):
        convert(weights.ctypes.data, out.ctypes.data, weights.size)
        bits = out.view(np.uint16)
        valid = not out.size or bool((bits & _SIGNLESS).max() < _INFINITE[kind.name])
    else:
        # This prepares the tables of the type on first use, under a lock of its own.
        ggml.ggml_quantize_init(kind.id)
        size = ggml.ggml_quantize_chunk(kind.id, weights.ctypes.data, out.ctypes.data, 0, rows, width, pointer)
        valid = size == out.size and ggml.ggml_validate_row_data(kind.id, out.ctypes.data, size)
    if not valid:
        raise BitladderError(f"the {kind.name} kernel gave invalid blocks: are there NaN or Inf weights?")
    return out


def lost_rows(weights: Floats, stored: Floats) -> int:
    """How many rows lose more than 1 % of their size because their weights are too small for the type.

    F16 has no number below 6e-8, and fewer digits below 6e-5. Weights there become 0 or lose most of their digits
    without an error. What counts is the row: a few weights that vanish beside large ones cost nothing.

    Parameters:
        weights: the weights, float32 [rows, width].
        stored: what the type stores of them, expanded, float32 [rows, width].

    Example:
        >>> tiny = np.array([[1.0, 1e-9], [1e-9, 2e-9]], np.float32)
        >>> lost_rows(tiny, tiny.astype(np.float16).astype(np.float32))
        1
    """
    # F16 errs by 2⁻²⁵ at most where it underflows: a row with a larger weight than this cannot lose so much.
    largest = np.maximum(weights.max(axis=1, initial=0), -weights.min(axis=1, initial=0))
    small = np.flatnonzero((largest > 0) & (largest < 2.0**-18 * math.sqrt(weights.shape[1])))
    if not len(small):
        return 0
    # Squares of small float32 numbers vanish themselves, so rows are scaled to 1 first.
    scale = largest[small].astype(np.float64)[:, None]
    scaled = weights[small] / scale
    gap = stored[small] / scale - scaled
    return int((np.square(gap).sum(axis=1) > _MOST_LOST * np.square(scaled).sum(axis=1)).sum())


def lost_in(name: str, lost: int, of: int, kind: str, remedy: str, unit: str = "rows") -> str:
    """The warning of a tensor that loses rows, or blocks, at the small end.

    Example:
        >>> lost_in("blk.0.attn_k.weight", 2, 2, "f16", "convert with --outtype bf16")
        'blk.0.attn_k.weight: all rows are lost, because f16 has no numbers as small; convert with --outtype bf16'
    """
    some = f"all {unit} are" if lost == of else f"{lost} of {of} {unit} are"
    return f"{name}: {some} lost, because {kind} has no numbers as small; {remedy}"
