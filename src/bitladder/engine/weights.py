"""What is changed in a loaded model: the bytes of weights, and activations while a graph is computed.

Inputs are rounded as the CPU's kernels round them, or outputs get noise. The CPU's kernel of a quantized weight rounds
its input to a type of its own before it multiplies: to blocks of 32 for q8_0, q5_1 or iq4_nl, to blocks of 256 for
K-quants and most I-quants. Where inputs have outliers, the larger blocks cause a good part of what a 5- or 6-bit type
loses.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context, Decoding
from bitladder.engine.cpu_kernels import input_type
from bitladder.engine.model import Model
from bitladder.engine.native import Tensor, ggml
from bitladder.engine.observe import OP_OFFSET, GraphCallback, tensor_values, weight_name
from bitladder.engine.types import RowKernels, TensorType, all_types, dequantize_into, quantize_rows, type_by_name
from bitladder.errors import BitladderError, overflow
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Weights:
    """Handles to the weights of a loaded model.

    One token is decoded, and the weights that the graph reads are noted. The model must be loaded with mmap=False and
    repack=False: a write into a mapped file ends the process, and repacked blocks have another layout.

    Raises BitladderError for a model that is loaded otherwise.
    """

    def __init__(self, model: Model) -> None:
        if not model.replaceable:
            raise BitladderError("weights can only be replaced in a model loaded with mmap=False, repack=False")
        self._model = model  # the handles are valid as long as the model
        self._kernels = RowKernels()
        noting = _WeightAddresses()
        with Context(model, Decoding(n_ctx=32), callback=noting) as context:
            context.decode([max(model.bos, 0)], [0], [0], [True])
        self._handles = noting.addresses

    def names(self) -> list[str]:
        """The weights that the graph uses, sorted."""
        return sorted(self._handles)

    def get(self, name: str) -> Bytes:
        """The bytes of a weight as stored: a copy, uint8, flat."""
        tensor = self._tensor(name)
        out = np.empty(_nbytes(tensor), np.uint8)
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), out.ctypes.data, 0, out.size)
        return out

    def set_bytes(self, name: str, data: Bytes) -> None:
        """Replaces a weight by bytes of its own type. Raises BitladderError if the size differs."""
        tensor = self._tensor(name)
        data = np.ascontiguousarray(data)
        if data.nbytes != _nbytes(tensor):
            raise BitladderError(
                f"{name} has {number_of(_nbytes(tensor), 'byte')} in the loaded model, not {data.nbytes:,}"
            )
        ggml.ggml_backend_tensor_set(ctypes.addressof(tensor), data.ctypes.data, 0, data.nbytes)

    def set(self, name: str, values: Floats) -> None:
        """Replaces a weight by float32 values, shape [rows, n_in], stored in the type that the loaded model has."""
        tensor = self._tensor(name)
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, tensor.ne[0])
        self.set_bytes(name, self._kernels.quantize(rows, all_types()[tensor.type]).reshape(-1))

    def _tensor(self, name: str) -> Tensor:
        if name not in self._handles:
            raise BitladderError(f"the model has no weight {name!r} that decoding uses")
        return Tensor.from_address(self._handles[name])


class _WeightAddresses(GraphCallback):
    """Notes the address of every weight that the graph reads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: dict[str, int] = {}

    def call(self, address: int, ask: bool) -> bool:
        for pointer in tuple(Tensor.from_address(address).src)[:3]:
            if pointer:
                source = Tensor.from_address(pointer)
                if source.op == 0 and source.name.endswith((b".weight", b".bias")):
                    self.addresses.setdefault(weight_name(source.name), pointer)
        return not ask


def _nbytes(tensor: Tensor) -> int:
    kind = all_types()[tensor.type]
    return kind.row_bytes(tensor.ne[0]) * int(tensor.ne[1] * tensor.ne[2] * tensor.ne[3])


class KernelInputs(GraphCallback):
    """Rounds the inputs of chosen weights as the CPU's kernels of given types round them.

    `pretend` chooses weights and types. No other multiplication changes. A context with this callback computes node by
    node while any weight is chosen. A decode raises BitladderError where the CPU cannot write to the inputs' memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._types: dict[str, TensorType] = {}
        self._restore: Callable[[], None] | None = None
        self._last: tuple[str, Floats, Floats] = ("", np.empty(0, np.float32), np.empty(0, np.float32))

    def pretend(self, types: dict[str, TensorType]) -> None:
        """Chooses weights, and for each the type in which it is multiplied."""
        rounded_to = {name: input_type(kind) for name, kind in types.items()}
        self._types = {name: kind for name, kind in rounded_to.items() if kind is not None}

    def call(self, address: int, ask: bool) -> bool:
        """See `GraphCallback.call`."""
        if not self._types:
            return not ask
        if not ask and self._restore:
            self._restore()
            self._restore = None
        if ask and ctypes.c_int.from_address(address + OP_OFFSET).value in (ggml.MUL_MAT, ggml.MUL_MAT_ID):
            self._round(Tensor.from_address(address))
        return True

    def _round(self, node: Tensor) -> None:
        weight, inputs = Tensor.from_address(node.src[0]), Tensor.from_address(node.src[1])
        kind = None if weight.op else self._types.get(weight_name(weight.name))
        if kind is None or inputs.type or inputs.ne[0] % kind.block:
            return
        if not ggml.ggml_backend_buffer_is_host(inputs.buffer):
            raise BitladderError("activations on a GPU cannot be rounded; measure with -ngl 0")
        values = tensor_values(inputs)
        exact = values.copy()
        # Q, K and V multiply the same input one after the other, and so do gate and up: it is rounded once.
        last_kind, last_exact, last = self._last
        if last_kind != kind.name or not np.array_equal(last_exact, exact):
            _refuse_too_large(weight_name(weight.name), exact, kind)
            last = rounded(exact.reshape(-1, inputs.ne[0]), kind).reshape(values.shape)
            self._last = kind.name, exact, last
        values[...] = last
        self._restore = lambda: np.copyto(values, exact)


def _refuse_too_large(name: str, inputs: Floats, kind: TensorType) -> None:
    """Raises BitladderError for inputs that are not finite, or whose scale no F16 can hold; q8_K has F32 scales."""
    largest = float(np.abs(inputs).max(initial=0))
    if not np.isfinite(largest):
        raise overflow(f"the inputs of {name} are")
    if kind.name != "q8_K" and not largest <= 127 * 65504.0:
        raise BitladderError(
            f"an input of {name} is {largest:.3g}, which blocks of {kind.name} cannot hold: types whose kernels round "
            "inputs so give no finite result"
        )


def rounded(rows: Floats, kind: TensorType) -> Floats:
    """Rounds activations to a type and expands them again.

    Parameters:
        rows: float32, shape [rows, width].
        kind: q8_0, q8_1 or q8_K. The source of the last is quantize_row_q8_K_ref of ggml.

    Returns:
        float32, shape [rows, width].
    """
    if kind.name != "q8_K":
        plain = type_by_name("q8_0")  # q8_1 stores the same integers and scales, and a sum beside them
        out = np.empty_like(rows)
        dequantize_into(quantize_rows(rows, plain), plain, out)
        return out
    blocks = rows.reshape(-1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = np.where(largest == 0, np.float32(1), np.float32(-127) / np.where(largest == 0, np.float32(1), largest))
    codes = np.minimum(np.rint(blocks * scale), np.float32(127))
    return (codes / scale).astype(np.float32).reshape(rows.shape)


class NoisyOutputs(GraphCallback):
    """Adds normal noise to the outputs of multiplications by some weights, at some rows (tokens of a batch).

    `disturb` chooses weights and rows. `measure` adds nothing and notes the squared outputs instead. A decode must be
    one computation (a batch no larger than -ub) in which every token is an output. Its sequences must have one length
    and follow one another, so that rows are the tokens of the batch in order. Works on any back end. A decode raises
    BitladderError for outputs that are not F32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deviations: Mapping[str, float] = {}
        self._rows = np.zeros(0, np.intp)
        self._generator = np.random.default_rng(0)
        self._measure, self._tokens = False, 0
        self.squares: dict[str, npt.NDArray[np.float64]] = {}

    def quiet(self) -> None:
        """Changes nothing in the next decodes."""
        self._deviations, self._measure = {}, False

    def measure(self, tokens: int) -> None:
        """Notes in the next decodes the mean squared output of every weight in `squares`, float64, shape [tokens].

        A weight whose output has not one row for each of the `tokens` of a batch is left out: a graph multiplies by it
        head by head.
        """
        self.quiet()
        self._measure, self._tokens = True, tokens

    def disturb(
        self, deviations: Mapping[str, float], rows: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> None:
        """Adds noise in the next decodes.

        Parameters:
            deviations: standard deviation of the noise, for each weight.
            rows: rows of the outputs that get noise.
            generator: source of the noise.
        """
        self.quiet()
        self._deviations, self._rows, self._generator = deviations, rows, generator

    def call(self, address: int, ask: bool) -> bool:
        """See `GraphCallback.call`."""
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        if op not in (ggml.MUL_MAT, ggml.MUL_MAT_ID) or not (self._measure or self._deviations):
            return not ask
        node = Tensor.from_address(address)
        weight = Tensor.from_address(node.src[0])
        name = weight_name(weight.name)
        # Weights are leaves of the graph; attention multiplies by computed tensors.
        chosen = not weight.op and (self._measure or name in self._deviations)
        if ask:
            return chosen
        if chosen:
            self._change(node, name, op == ggml.MUL_MAT_ID)
        return True

    def _change(self, node: Tensor, name: str, experts: bool) -> None:
        if node.type != 0:
            raise BitladderError(f"the output of {name} is not F32 in this graph; it cannot be disturbed")
        ne = tuple(node.ne)
        # [tokens, experts used, n_out], or [tokens, n_out]; sequences may have a dimension of their own. A product is
        # contiguous.
        shape = ne[2::-1] if experts else (ne[1] * ne[2] * ne[3], ne[0])
        if self._measure and shape[0] != self._tokens:
            return
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
