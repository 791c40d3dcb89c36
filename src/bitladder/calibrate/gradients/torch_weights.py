"""The tensors of a model file as torch tensors, float32, and products with them, which a tap may see.

As many tensors are in memory as a budget allows.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from typing import Any

import torch

from bitladder.calibrate.gradients.usable import torch_threads
from bitladder.engine import GPUS, RowKernels, as_torch, device_memory
from bitladder.errors import GradientsError
from bitladder.files import Closing
from bitladder.gguf import GgufFile, TensorInfo

LARGE, PIECES = 1 << 24, 16  # a matrix of so many numbers is multiplied in so many pieces, by columns


@dataclasses.dataclass(frozen=True)
class Routed:
    """Which expert multiplies each row of an input. Rows are in the order of the experts.

    Parameters:
        counts: rows of each expert.
        tokens: the token of each row, int64 [rows].
    """

    counts: tuple[int, ...]
    tokens: torch.Tensor

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and its rows."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


# What a tap is shown during the backward pass: a weight's name, its input [rows, n_in], the gradient of the objective
# with respect to its output [rows, n_out], and the experts of the rows. Without experts a row is a token.
Tap = Callable[[str, torch.Tensor, torch.Tensor, Routed | None], None]


class TorchWeights(Closing):
    """Tensors by name.

    Within `memory` bytes they stay expanded. What does not fit is read and expanded again at each use, so that a model
    of any size needs the memory of its largest tensor. `used` are the names that were read.

    Parameters:
        file: the model.
        memory: bytes for expanded tensors.
        threads: threads that expand them.
        device: what multiplies by them (`engine.torch_device`); None is the CPU. Then they are kept there, in half of
            its memory. Tensors that `get` returns are on the CPU all the same.
    """

    def __init__(self, file: GgufFile, memory: int, threads: int | None = None, device: str | None = None) -> None:
        self._file = file
        self._device = None if device is None else as_torch(device)
        self._placed: dict[tuple[str, int], torch.Tensor] = {}
        self._device_memory = self._device_room = 0
        if device is not None:
            free = device_memory(device)
            self._device_memory = self._device_room = memory if free is None or device not in GPUS else free // 2
        self._memory = self._room = memory
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._halves: dict[tuple[str, int], torch.Tensor] = {}
        self._kernels = RowKernels(threads)
        self._keeping = threading.Lock()
        self.used: set[str] = set()

    @property
    def most_bytes(self) -> int:
        """Bytes of main memory that expanded weights take at most: all of the file in float32, or the memory for them.
        With a device it is the largest tensor."""
        if self._device is not None and self._device.type != "cpu":
            return 4 * max(tensor.elements for tensor in self._file.tensors.values())
        return min(self._memory, 4 * sum(tensor.elements for tensor in self._file.tensors.values()))

    def close(self) -> None:
        """Frees the tensors."""
        self.forget()
        self._kernels.close()

    def forget(self) -> None:
        """Frees the expanded tensors. They are read again when they are needed."""
        self._kept.clear()
        self._halves.clear()
        self._placed.clear()
        self._room, self._device_room = self._memory, self._device_memory

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, width) of a matrix of a tensor; a vector has one row. Raises GradientsError for an unknown name."""
        tensor = self._tensor(name)
        return tensor.rows_per_matrix, tensor.width

    def matrices(self, name: str) -> int:
        """Matrices of a tensor: its experts, or 1. Raises GradientsError for a name that is not there."""
        tensor = self._tensor(name)
        return tensor.rows // tensor.rows_per_matrix

    def get(self, name: str, matrix: int = 0) -> torch.Tensor:
        """A matrix of a tensor, float32 [rows, width], or [width] for a vector. Raises GradientsError as `shape`."""
        self.used.add(name)
        kept = self._kept.get((name, matrix))
        return self._keep(self._kept, name, matrix, self._read(name, matrix)) if kept is None else kept

    def get_half(self, name: str, matrix: int = 0) -> torch.Tensor:
        """`get` in bfloat16. Values that `replace` put there do not count."""
        self.used.add(name)
        kept = self._halves.get((name, matrix))
        return self._keep(self._halves, name, matrix, self._read(name, matrix).bfloat16()) if kept is None else kept

    def for_product(self, name: str, matrix: int, *, half: bool) -> torch.Tensor:
        """`get` or `get_half`, where products are made. Values that `replace` put there count on a device."""
        if self._device is None:
            return self.get_half(name, matrix) if half else self.get(name, matrix)
        self.used.add(name)
        key = name, matrix
        if key not in self._placed:
            values = self._kept[key] if key in self._kept else self._read(name, matrix)
            values = (values.bfloat16() if half else values).to(self._device)
            if values.nbytes > self._device_room:
                return values
            self._device_room -= values.nbytes
            self._placed[key] = values
        return self._placed[key]

    def _tensor(self, name: str) -> TensorInfo:
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise GradientsError(f"{self._file.path.name} has no tensor {name}")
        return tensor

    def _read(self, name: str, matrix: int) -> torch.Tensor:
        rows, width = self.shape(name)
        tensor = self._file.tensors[name]
        data = self._file.read(tensor, matrix * rows, (matrix + 1) * rows)
        values = torch.from_numpy(self._kernels.dequantize(data, tensor.type, width))
        return values.reshape(width) if len(tensor.shape) == 1 else values

    def _keep(
        self, kept: dict[tuple[str, int], torch.Tensor], name: str, matrix: int, values: torch.Tensor
    ) -> torch.Tensor:
        with self._keeping:  # another chunk may have read it meanwhile
            if (name, matrix) not in kept and values.nbytes <= self._room:
                self._room -= values.nbytes
                kept[name, matrix] = values
        return values

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Gives a tensor other values, float32 [rows of all matrices, width]. They stay in memory."""
        for matrix, part in enumerate(torch.split(values, self.shape(name)[0])):
            self._kept[name, matrix] = part
            if (placed := self._placed.pop((name, matrix), None)) is not None:
                self._device_room += placed.nbytes

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, float32 [len(indices), width]."""
        self.used.add(name)
        kept = self._kept.get((name, 0))
        if kept is not None:
            return kept[indices]
        _, width = self.shape(name)
        tensor = self._file.tensors[name]
        distinct, places = torch.unique(indices, return_inverse=True)
        parts = [
            self._kernels.dequantize(self._file.read(tensor, i, i + 1), tensor.type, width) for i in distinct.tolist()
        ]
        return torch.cat([torch.from_numpy(part) for part in parts])[places]

    def unused(self) -> list[str]:
        """Tensors of the file that were never read."""
        return [name for name in self._file.tensors if name not in self.used]


class _Multiply(torch.autograd.Function):
    """y = x Wᵀ. W is read when it is needed and not kept in the graph; x is kept only if the tap wants it."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layers: "Layers", name: str, routed: Routed | None) -> torch.Tensor:
        ctx.layers, ctx.name, ctx.routed = layers, name, routed
        ctx.tap = layers.tap_of(name)
        if ctx.tap is not None:
            ctx.save_for_backward(inputs)
        return layers.multiply(inputs, name, routed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        layers, (gradient,) = ctx.layers, gradients
        if ctx.tap is not None:
            (inputs,) = ctx.saved_tensors
            rows = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            ctx.tap(ctx.name, *rows, ctx.routed)
        down = layers.back(gradient, ctx.name, ctx.routed) if ctx.needs_input_grad[0] else None
        return down, None, None, None


class Layers:
    """Products with one model's weights; sequences are [batch, length, width].

    Parameters:
        weights: the weights.
        half: whether products are made in bfloat16.
    """

    def __init__(self, weights: TorchWeights, half: bool = False) -> None:
        self.weights = weights
        self.half = half
        self._own = threading.local()  # chunks that are computed side by side have taps of their own
        self.uses: collections.Counter[str] = collections.Counter()  # products made with each weight, in their order

    def set_tap(self, names: Collection[str], tap: Tap) -> None:
        """What a backward pass shows of the products that this thread makes from now on.

        Parameters:
            names: the weights.
            tap: is shown them.
        """
        self._own.names, self._own.tap = frozenset(names), tap

    def tap_of(self, name: str) -> Tap | None:
        """Who is shown this weight."""
        return self._own.tap if name in getattr(self._own, "names", ()) else None

    def set_repeatable(self, pool: Executor | None) -> None:
        """Products of the CPU that this thread makes from now on do not depend on the number of threads.

        Parameters:
            pool: threads, each with one of torch's, that share large products; None makes them in this thread.
        """
        self._own.repeatable, self._own.pool = True, pool

    def set_check(self, check: Callable[[], None]) -> None:
        """Calls this before each product of this thread. What it raises ends the computation."""
        self._own.check = check

    def multiply(self, inputs: torch.Tensor, name: str, routed: Routed | None = None) -> torch.Tensor:
        """Inputs [..., n_in] times the transpose of a weight, float32; rows that are routed, times their experts."""
        n_out, _ = self.weights.shape(name)
        if routed is None:
            return self._product(inputs, name, 0, transposed=True)
        outputs = inputs.new_empty(len(inputs), n_out)
        for expert, rows in routed.parts():
            outputs[rows] = self._product(inputs[rows], name, expert, transposed=True)
        return outputs

    def back(self, gradient: torch.Tensor, name: str, routed: Routed | None = None) -> torch.Tensor:
        """The derivative by the inputs of a weight, from that by its outputs: `gradient` times the weight."""
        if routed is None:
            return self._product(gradient, name, 0)
        _, n_in = self.weights.shape(name)
        inputs = gradient.new_empty(len(gradient), n_in)
        for expert, rows in routed.parts():
            inputs[rows] = self._product(gradient[rows], name, expert)
        return inputs

    def _product(self, rows: torch.Tensor, name: str, matrix: int, *, transposed: bool = False) -> torch.Tensor:
        """Rows times a matrix of a weight. A vector of the file is a matrix of one row."""
        getattr(self._own, "check", lambda: None)()
        weight = self.weights.for_product(name, matrix, half=self.half).view(self.weights.shape(name))
        weight = weight.T if transposed else weight
        # Everything else is computed where the rows are, on the CPU.
        there = (rows.bfloat16() if self.half else rows).to(weight.device)
        if weight.device.type == "cpu" and getattr(self._own, "repeatable", False):
            return _repeatable_product(there, weight, self._own.pool)
        return (there @ weight).to(rows.device).float()

    def linear(self, inputs: torch.Tensor, prefix: str, routed: Routed | None = None) -> torch.Tensor:
        """Multiplies by PREFIX.weight and adds PREFIX.bias where the file has one."""
        self.uses[f"{prefix}.weight"] += 1
        product: torch.Tensor = _Multiply.apply(inputs, self, f"{prefix}.weight", routed)  # type: ignore[no-untyped-call]
        bias = f"{prefix}.bias"
        return product + self.weights.get(bias) if self.weights.has(bias) else product


def _repeatable_product(rows: torch.Tensor, weight: torch.Tensor, pool: Executor | None) -> torch.Tensor:
    """Rows [..., k] times a matrix [k, n], float32. Torch adds up in another order with another number of threads."""
    with torch_threads(1):
        if weight.numel() < LARGE:
            return (rows @ weight).float()
        n = weight.shape[1]
        out, step = torch.empty(*rows.shape[:-1], n), 64 * -(-n // (64 * PIECES))

        @torch.no_grad()
        def piece(start: int) -> None:
            out[..., start : start + step] = rows @ weight[:, start : start + step]

        list((pool.map if pool else map)(piece, range(0, n, step)))
        return out


def weight_gradient(inputs: torch.Tensor, gradients: torch.Tensor, routed: Routed | None) -> torch.Tensor:
    """The derivative by a weight, Σ g xᵀ over rows: [n_out, n_in], those of all experts below each other.

    The parameters are what a tap is shown.
    """
    if routed is None:
        return gradients.T @ inputs
    n_out = gradients.shape[1]
    whole = gradients.new_zeros(len(routed.counts) * n_out, inputs.shape[1])
    for expert, rows in routed.parts():
        whole[expert * n_out : (expert + 1) * n_out] = gradients[rows].T @ inputs[rows]
    return whole


def nothing(name: str, inputs: torch.Tensor, gradient: torch.Tensor, routed: Routed | None) -> None:
    """A tap that does nothing."""
    del name, inputs, gradient, routed
