"""What the CPU's kernels of quantized weights do to their inputs, done to a model whose weights are not quantized.

Such a kernel rounds the activations to a type of its own before it multiplies: blocks of 32 for q8_0, q5_1 or iq4_nl,
blocks of 256 for K-quants and most I-quants. Where inputs have outliers the larger blocks cost a good part of what a
5- or 6-bit type loses.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.matvec import input_type
from bitladder.engine.native import MUL_MAT, MUL_MAT_ID, Tensor, ggml, llama
from bitladder.engine.observe import Trampoline, _values, weight_name
from bitladder.engine.types import TensorType, dequantize_into, quantize_rows, type_by_name
from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]
_OP = Tensor.op.offset


class KernelInputs(Trampoline):
    """Rounds the inputs of chosen weights' multiplications as the kernels of given types would.

    `pretend` names the weights and types; for all others nothing changes. A context that has this callback computes
    node by node while any weight is named. Raises BitladderError (when decoding) where inputs lie in memory that
    cannot be written to here.
    """

    def __init__(self) -> None:
        self._error = None
        self._types: dict[str, TensorType] = {}
        self._restore: Callable[[], None] | None = None
        self._last: tuple[str, Floats, Floats] = ("", np.empty(0, np.float32), np.empty(0, np.float32))
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)

    def pretend(self, types: dict[str, TensorType]) -> None:
        """Multiply by these weights (name → type) as if they were stored so."""
        found = {name: input_type(kind) for name, kind in types.items()}
        self._types = {name: kind for name, kind in found.items() if kind is not None}

    def _call(self, address: int, ask: bool, _data: Any) -> bool:
        if self._error is not None:
            return ask
        if not self._types:
            return not ask
        try:
            if not ask and self._restore:
                self._restore()
                self._restore = None
            if ask and ctypes.c_int.from_address(address + _OP).value in (MUL_MAT, MUL_MAT_ID):
                self._round(Tensor.from_address(address))
        except BaseException as error:
            self._error = error
        return True

    def _round(self, node: Tensor) -> None:
        weight, inputs = Tensor.from_address(node.src[0]), Tensor.from_address(node.src[1])
        kind = None if weight.op else self._types.get(weight_name(weight.name))
        if kind is None or inputs.type or inputs.ne[0] % kind.block:
            return
        if not ggml.ggml_backend_buffer_is_host(inputs.buffer):
            raise BitladderError("activations on a GPU cannot be rounded; measure with -ngl 0")
        values = _values(inputs)
        exact = values.copy()
        # Q, K and V multiply the same input one after the other, and so do gate and up: it is rounded once.
        last_kind, last_exact, last = self._last
        if last_kind != kind.name or not np.array_equal(last_exact, exact):
            last = rounded(exact.reshape(-1, inputs.ne[0]), kind).reshape(values.shape)
            self._last = kind.name, exact, last
        values[...] = last
        self._restore = lambda: np.copyto(values, exact)


def rounded(rows: Floats, kind: TensorType) -> Floats:
    """Rows float32 [rows, width] rounded to q8_0, q8_1 or q8_K; source of the last: quantize_row_q8_K_ref of ggml."""
    if kind.name != "q8_K":
        plain = type_by_name("q8_0")  # q8_1 differs in what it keeps beside the same numbers
        out = np.empty_like(rows)
        dequantize_into(quantize_rows(rows, plain), plain, out)
        return out
    blocks = rows.reshape(-1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = np.where(largest == 0, np.float32(1), np.float32(-127) / np.where(largest == 0, np.float32(1), largest))
    codes = np.minimum(np.rint(blocks * scale), np.float32(127))
    return (codes / scale).astype(np.float32).reshape(rows.shape)
