"""Watching a graph while the library computes it: the inputs of every multiplication by a weight.

The scheduler calls back before each node and asks whether the node is wanted. It calls back again after each node that
is. The nodes of interest are MUL_MAT and MUL_MAT_ID: src[0] is the weight, src[1] its input and, for experts, src[2]
the experts that each token goes to.
"""

import contextlib
import ctypes
import dataclasses
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import Tensor, ggml, llama
from bitladder.errors import overflow

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Multiplication:
    """One multiplication by a weight.

    Parameters:
        weight: name of the weight.
        shape: shape of the weight in GGUF order, (n_in, n_out, n_experts or matrices, 1).
        tokens: rows of the input.
        experts: whether each token has its own matrices.
        input_id: the same number for consecutive multiplications of one input.
    """

    weight: str
    shape: tuple[int, ...]
    tokens: int
    experts: bool
    input_id: int


class Observer(Protocol):
    """Watches the inputs of multiplications."""

    def wants(self, multiplication: Multiplication) -> bool:
        """Whether `see` is to be called with the input of this multiplication. The input is not computed yet."""

    def see(self, multiplication: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        """Receives an input.

        Parameters:
            multiplication: what is computed.
            inputs: float32, shape [matrices, tokens, n_in]; for experts [tokens, n_used or 1, n_in]. Valid during the
                call only.
            experts: expert ids, int32, shape [tokens, n_used]; None for dense weights.
        """


class SatisfiedObserver(Observer, Protocol):
    """An observer that needs only the first part of each computation."""

    def satisfied(self) -> bool:
        """Whether the rest of this computation can be left out."""


def weight_name(name: bytes) -> str:
    """The name of a weight in its file. Back ends that copy a weight put a prefix and a suffix around it, with '#'."""
    parts = name.decode("utf-8", "replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]


# Offsets in ggml_tensor: these two fields are read a thousand times per batch.
OP_OFFSET = Tensor.op.offset
_NAME_OFFSET = Tensor.name.offset
FINAL_NORM = b"result_norm\0"  # llama.cpp's name for the input of the head, in every architecture


class GraphCallback:
    """A C callback that sees each node of a graph. An exception in it is kept until the decode is done.

    Subclasses implement `call`. Its answer before a node says whether the callback wants the node, and its answer after
    a node whether the computation goes on.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self.callback = llama.ggml_backend_sched_eval_callback(self._guarded)

    def call(self, address: int, ask: bool) -> bool:
        """Looks at the ggml_tensor at `address`: before it is computed where `ask` is true, otherwise after."""
        raise NotImplementedError

    def _guarded(self, address: int, ask: bool, _data: Any) -> bool:
        if self._error is not None:
            return ask
        try:
            return self.call(address, ask)
        except BaseException as error:
            # No exception may leave a C callback.
            self._error = error
            return ask

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raises what went wrong in the callback, Ctrl-C included, when the context ends."""
        with self._interrupts_kept():
            yield
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _interrupts_kept(self) -> Iterator[None]:
        """Inside the context, Ctrl-C or SIGTERM stops the computation instead of raising an exception at once.

        Python handles a signal at the first Python instruction after it. While the library computes, that instruction
        is the entry of a callback, where no `try` is open yet: ctypes would print the exception and drop it. Nothing
        happens outside the main thread, which handles no signals, or for a signal that Python does not handle.
        """
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

        def keep(number: int, frame: object) -> None:
            try:
                handlers[number](number, frame)
            except BaseException as error:
                self._error = error

        for number in handlers:
            signal.signal(number, keep)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Watching(GraphCallback):
    """Shows the inputs of multiplications to an observer.

    Parameters:
        observer: the observer.
        skip_head: whether each computation ends at the final norm, so that no logits are computed. An overflow in the
            last block, which no input of a weight shows, is an error there.
    """

    def __init__(self, observer: Observer, *, skip_head: bool = False) -> None:
        super().__init__()
        self._observer = observer
        self._skip_head = skip_head

    def call(self, address: int, ask: bool) -> bool:
        """See `GraphCallback.call`."""
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        if op not in (ggml.MUL_MAT, ggml.MUL_MAT_ID):
            if self._skip_head and ctypes.string_at(address + _NAME_OFFSET, len(FINAL_NORM)) == FINAL_NORM:
                if not ask and not np.isfinite(tensor_values(Tensor.from_address(address))).all():
                    raise overflow("the final hidden states are")
                return ask  # this ends the computation: only the head follows
            return not ask
        node = Tensor.from_address(address)
        weight = Tensor.from_address(node.src[0])
        inputs = Tensor.from_address(node.src[1])
        experts = op == ggml.MUL_MAT_ID
        tokens = inputs.ne[2] if experts else inputs.ne[1]
        seen = Multiplication(weight_name(weight.name), tuple(weight.ne), tokens, experts, node.src[1])
        if ask:
            return inputs.type == 0 and self._observer.wants(seen)
        ids = _expert_ids(Tensor.from_address(node.src[2])) if experts else None
        values = tensor_values(inputs)
        self._observer.see(seen, values[0] if experts else values.reshape(-1, *values.shape[2:]), ids)
        return True


class WatchingUntilSatisfied(Watching):
    """Ends each computation (of -ub tokens) as soon as its observer is satisfied.

    The logits are then undefined. What is computed before the end is right, the cache included: the next tokens of the
    same sequence can be watched as far again.
    """

    def __init__(self, observer: SatisfiedObserver) -> None:
        super().__init__(observer)
        self._satisfied = observer.satisfied

    def call(self, address: int, ask: bool) -> bool:
        """See `GraphCallback.call`."""
        return ask if self._satisfied() else super().call(address, ask)


def tensor_values(tensor: Tensor) -> Floats:
    """An F32 tensor as an array [ne3, ne2, ne1, ne0]: a view where the CPU can read its memory, otherwise a copy."""
    ne = tuple(tensor.ne)[::-1]
    nb = tuple(tensor.nb)[::-1]
    span = sum((n - 1) * b for n, b in zip(ne, nb, strict=True)) + 4
    if ggml.ggml_backend_buffer_is_host(tensor.buffer):
        raw: Any = (ctypes.c_char * span).from_address(tensor.data)
    else:
        raw = ctypes.create_string_buffer(span)
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw, 0, span)
    return np.ndarray(ne, np.float32, raw, 0, nb)


def _expert_ids(tensor: Tensor) -> npt.NDArray[np.int32]:
    """Expert ids [tokens, n_used], a copy. The tensor is a small view with gaps."""
    n_used, tokens = tensor.ne[0], tensor.ne[1]
    span = (tokens - 1) * tensor.nb[1] + n_used * 4
    raw = ctypes.create_string_buffer(span)
    ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw, 0, span)
    return np.ndarray((tokens, n_used), np.int32, memoryview(raw), 0, (tensor.nb[1], tensor.nb[0])).copy()


class HiddenStates:
    """An observer that keeps the final hidden states: the input of the multiplication by the head.

    There is a row for each output of a batch, in the order of the batch where it holds one sequence.

    Parameters:
        head: name of the head's weight, "output.weight", or "token_embd.weight" where the head is tied.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self._parts: list[Floats] = []

    def wants(self, multiplication: Multiplication) -> bool:
        """The head only."""
        return multiplication.weight == self._head and multiplication.tokens > 0

    def see(self, multiplication: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        """Keeps a copy."""
        self._parts.append(inputs.reshape(-1, inputs.shape[-1]).copy())

    def take(self) -> Floats:
        """The states since the last call, float32, shape [outputs, n_embd]."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
