"""Noise in what chosen multiplications put out, at chosen tokens: what an error there costs, by trying it."""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import MUL_MAT, MUL_MAT_ID, Tensor, ggml, llama
from bitladder.engine.observe import Trampoline, weight_name
from bitladder.errors import BitladderError

_OP = Tensor.op.offset


class NoisyOutputs(Trampoline):
    """Adds normal noise to the outputs of multiplications by some weights, at some rows (tokens of a batch).

    `disturb` says to which; `measure` looks instead, and leaves each weight's squared outputs by row. A decode must be
    one computation (a batch no larger than -ub) of which every token is an output, and sequences must follow one
    another in it, all of one length: then the rows are the batch's tokens in order. Works on any back end. Raises
    BitladderError (when decoding) for outputs that are not F32.
    """

    def __init__(self) -> None:
        self._error = None
        self._deviations: Mapping[str, float] = {}
        self._rows = np.zeros(0, np.intp)
        self._generator = np.random.default_rng(0)
        self._measure = False
        self.squares: dict[str, npt.NDArray[np.float64]] = {}
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)

    def quiet(self) -> None:
        """Leave the next decodes alone."""
        self._deviations, self._measure = {}, False

    def measure(self) -> None:
        """In the next decodes, note the mean squared output of every weight by row: `squares` [rows]."""
        self.quiet()
        self._measure = True

    def disturb(
        self, deviations: Mapping[str, float], rows: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> None:
        """In the next decodes, add noise of these standard deviations (by weight) to each output at `rows`."""
        self.quiet()
        self._deviations, self._rows, self._generator = deviations, rows, generator

    def _call(self, address: int, ask: bool, _data: Any) -> bool:
        if self._error is not None:
            return ask
        op = ctypes.c_int.from_address(address + _OP).value
        if op not in (MUL_MAT, MUL_MAT_ID) or not (self._measure or self._deviations):
            return not ask
        try:
            node = Tensor.from_address(address)
            weight = Tensor.from_address(node.src[0])
            name = weight_name(weight.name)
            # Weights are leaves of the graph; attention multiplies by what was computed.
            chosen = not weight.op and (self._measure or name in self._deviations)
            if ask:
                return chosen
            if chosen:
                self._touch(node, name)
            return True
        except BaseException as error:
            self._error = error
            return False

    def _touch(self, node: Tensor, name: str) -> None:
        if node.type != 0:
            raise BitladderError(f"the output of {name} is not F32 in this graph; it cannot be disturbed")
        ne = tuple(node.ne)
        # [tokens, n_out], or [tokens, experts used, n_out]; a product is contiguous.
        shape = ne[1::-1] if ne[2] == ne[3] == 1 else ne[2::-1]
        size = int(np.prod(ne)) * 4
        host = ggml.ggml_backend_buffer_is_host(node.buffer)
        raw: Any = (ctypes.c_char * size).from_address(node.data) if host else ctypes.create_string_buffer(size)
        if not host:
            ggml.ggml_backend_tensor_get(ctypes.addressof(node), raw, 0, size)
        values = np.frombuffer(raw, np.float32).reshape(shape)
        if self._measure:
            self.squares[name] = np.square(values, dtype=np.float64).reshape(len(values), -1).mean(1)
            return
        noise = self._generator.standard_normal((len(self._rows), *values.shape[1:]), np.float32)
        values[self._rows] += noise * np.float32(self._deviations[name])
        if not host:
            ggml.ggml_backend_tensor_set(ctypes.addressof(node), raw, 0, size)
