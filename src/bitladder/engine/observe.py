"""Watching a graph while it is computed: the inputs of every multiplication by a weight, and the weights themselves.

The scheduler calls back before each node ("do you want it?") and after those it was told yes for. For MUL_MAT and
MUL_MAT_ID nodes src[0] is the weight, src[1] its input and, for experts, src[2] the experts that each token goes to.
"""

import ctypes
import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import MUL_MAT, MUL_MAT_ID, Tensor, ggml, llama
from bitladder.engine.types import RowKernels, all_types
from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Multiplication:
    """One multiplication by a weight, seen before its inputs are computed.

    `shape` is the weight's, GGUF order: (n_in, n_out, n_experts or matrices, 1); `tokens` the rows of the input;
    `input_id` is the same for consecutive multiplications of one input.
    """

    weight: str
    shape: tuple[int, ...]
    tokens: int
    experts: bool
    input_id: int


class Observer(Protocol):
    """Who watches."""

    def wants(self, multiplication: Multiplication) -> bool:
        """Whether the input of this multiplication is to be shown."""

    def see(self, multiplication: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        """The input itself, valid during the call only.

        Dense: float32 [matrices, tokens, n_in]. Experts: [tokens, n_used or 1, n_in] with int32 ids [tokens, n_used].
        """


def weight_name(name: bytes) -> str:
    """A weight's name in the file; back ends that copy a weight add a prefix and suffix between '#'."""
    parts = name.decode("utf-8", "replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]


# Offsets into ggml_tensor, for the questions that are asked a thousand times per batch.
_OP = Tensor.op.offset
_NAME = Tensor.name.offset
FINAL_NORM = b"result_norm\0"  # what llama.cpp names the head's input in every architecture


class Trampoline:
    """Turns an Observer into the C callback; keeps the exception an observer raises until decode returns.

    With `skip_head` the computation stops at the final norm: who only watches blocks need not pay for logits.
    """

    def __init__(self, observer: Observer, skip_head: bool = False) -> None:
        self._observer = observer
        self._skip_head = skip_head
        self._error: BaseException | None = None
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)

    def keep_error(self, error: BaseException) -> None:
        """Stop the computation and raise this when decode is done."""
        self._error = error

    def raise_pending(self) -> None:
        """Raise what the observer raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, address: int, ask: bool, _data: Any) -> bool:
        op = ctypes.c_int.from_address(address + _OP).value
        if self._error is not None:
            return ask  # "yes" before the next node and "no" after it: that stops the computation
        if op not in (MUL_MAT, MUL_MAT_ID):
            if self._skip_head and ctypes.string_at(address + _NAME, len(FINAL_NORM)) == FINAL_NORM:
                return ask  # as above: what follows in this graph is the head
            return not ask
        try:
            node = Tensor.from_address(address)
            weight = Tensor.from_address(node.src[0])
            inputs = Tensor.from_address(node.src[1])
            experts = op == MUL_MAT_ID
            tokens = inputs.ne[2] if experts else inputs.ne[1]
            seen = Multiplication(weight_name(weight.name), tuple(weight.ne), tokens, experts, node.src[1])
            if ask:
                return inputs.type == 0 and self._observer.wants(seen)
            ids = _ids(Tensor.from_address(node.src[2])) if experts else None
            values = _values(inputs)
            self._observer.see(seen, values[0] if experts else values.reshape(-1, *values.shape[2:]), ids)
            return True
        except BaseException as error:
            # Nothing may leave a C callback; decode raises it again.
            self._error = error
            return False


def _values(tensor: Tensor) -> Floats:
    """An F32 tensor as an array [ne3, ne2, ne1, ne0]; a view where the memory can be read directly."""
    ne = tuple(tensor.ne)[::-1]
    nb = tuple(tensor.nb)[::-1]
    span = sum((n - 1) * b for n, b in zip(ne, nb, strict=True)) + 4
    if ggml.ggml_backend_buffer_is_host(tensor.buffer):
        raw: Any = (ctypes.c_char * span).from_address(tensor.data)
    else:
        raw = ctypes.create_string_buffer(span)
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw, 0, span)
    return np.ndarray(ne, np.float32, raw, 0, nb)


def _ids(tensor: Tensor) -> npt.NDArray[np.int32]:
    """Expert ids [tokens, n_used]. The tensor is a view with gaps, and small: it is always copied."""
    n_used, tokens = tensor.ne[0], tensor.ne[1]
    span = (tokens - 1) * tensor.nb[1] + n_used * 4
    raw = ctypes.create_string_buffer(span)
    ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw, 0, span)
    return np.ndarray((tokens, n_used), np.int32, memoryview(raw), 0, (tensor.nb[1], tensor.nb[0])).copy()


class HiddenStates:
    """Observer that keeps the final hidden states: the input of the multiplication by the head.

    `head` is the head's weight, "output.weight" or, where it is tied, "token_embd.weight". There is a row for each
    output asked for; with one sequence per batch they come in its order.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self._parts: list[Floats] = []

    def wants(self, seen: Multiplication) -> bool:
        """The head only."""
        return seen.weight == self._head and seen.tokens > 0

    def see(self, seen: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        """Keep a copy."""
        self._parts.append(inputs.reshape(-1, inputs.shape[-1]).copy())

    def take(self) -> Floats:
        """States since the last call, float32 [outputs, n_embd]."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


class _Noting(Trampoline):
    """Notes the address of every weight that the graph reads."""

    def __init__(self, handles: dict[str, int]) -> None:
        self._handles = handles
        self._error = None
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _data: Any) -> bool:
        for pointer in tuple(Tensor.from_address(address).src)[:3]:
            if pointer:
                source = Tensor.from_address(pointer)
                if source.op == 0 and source.name.endswith((b".weight", b".bias")):
                    self._handles.setdefault(weight_name(source.name), pointer)
        return not ask


class Weights:
    """Handles to the weights of a loaded model, by which one can be replaced in place.

    Made by decoding one token and noting which weights the graph reads. The model must be loaded with mmap=False and
    repack=False: writing into a mapped file is a crash, and repacked blocks have another layout.
    """

    def __init__(self, model: Any) -> None:
        from bitladder.engine.context import Context

        if not model.replaceable:
            raise BitladderError("weights can only be replaced in a model loaded with mmap=False, repack=False")
        self._model = model  # the handles die with it
        self._handles: dict[str, int] = {}
        self._kernels = RowKernels()

        with Context(model, n_ctx=32, n_batch=32, callback=_Noting(self._handles)) as context:
            context.decode([max(model.bos, 0)], [0], [0], [True])

    def names(self) -> list[str]:
        """Weights that the graph uses, sorted."""
        return sorted(self._handles)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._handles:
            raise BitladderError(f"the model has no weight {name!r} that decoding uses")
        return Tensor.from_address(self._handles[name])

    def get(self, name: str) -> npt.NDArray[np.uint8]:
        """The weight's bytes as stored (a copy), to be put back later with `set_bytes`."""
        tensor = self._tensor(name)
        out = np.empty(_nbytes(tensor), np.uint8)
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), out.ctypes.data, 0, out.size)
        return out

    def set_bytes(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Replace a weight by bytes of its own type. Raises BitladderError if the size differs."""
        tensor = self._tensor(name)
        data = np.ascontiguousarray(data)
        if data.nbytes != _nbytes(tensor):
            raise BitladderError(f"{name} has {_nbytes(tensor)} bytes in the loaded model, not {data.nbytes}")
        ggml.ggml_backend_tensor_set(ctypes.addressof(tensor), data.ctypes.data, 0, data.nbytes)

    def set(self, name: str, values: Floats) -> None:
        """Replace a weight by float32 values [rows, n_in], stored in the type the loaded model has for it."""
        tensor = self._tensor(name)
        kind = all_types()[tensor.type]
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, tensor.ne[0])
        self.set_bytes(name, self._kernels.quantize(rows, kind).reshape(-1))


def _nbytes(tensor: Tensor) -> int:
    kind = all_types()[tensor.type]
    return kind.row_bytes(tensor.ne[0]) * int(tensor.ne[1] * tensor.ne[2] * tensor.ne[3])
