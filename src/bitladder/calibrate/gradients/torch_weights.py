"""The tensors of a model file as torch tensors, float32, and products with them, which a tap may see.

As many tensors are in memory as a budget allows.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from bitladder.engine import RowKernels
from bitladder.errors import GradientsError
from bitladder.files import Closing
from bitladder.gguf import GgufFile

# What a tap is shown during the backward pass: a weight's name, its input [tokens, n_in], and the gradient of the
# objective with respect to its output [tokens, n_out].
Tap = Callable[[str, torch.Tensor, torch.Tensor], None]


class TorchWeights(Closing):
    """Tensors by name.

    Within `memory` bytes they stay expanded. What does not fit is read and expanded again at each use, so that a model
    of any size needs the memory of its largest tensor. `used` are the names that were read.
    """

    def __init__(self, file: GgufFile, memory: int, threads: int | None = None) -> None:
        self._file = file
        self._memory = self._room = memory
        self._kept: dict[str, torch.Tensor] = {}
        self._halves: dict[str, torch.Tensor] = {}
        self._kernels = RowKernels(threads)
        self.used: set[str] = set()

    @property
    def most_bytes(self) -> int:
        """Bytes that expanded weights take at most: all of the file in float32, or the memory for them."""
        return min(self._memory, 4 * sum(tensor.elements for tensor in self._file.tensors.values()))

    def close(self) -> None:
        """Frees the tensors."""
        self.forget()
        self._kernels.close()

    def forget(self) -> None:
        """Frees the expanded tensors. They are read again when they are needed."""
        self._kept.clear()
        self._halves.clear()
        self._room = self._memory

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, width) of a tensor; a vector has one row. Raises GradientsError for a name that is not there."""
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise GradientsError(f"{self._file.path.name} has no tensor {name}")
        return tensor.rows, tensor.width

    def get(self, name: str) -> torch.Tensor:
        """float32 [rows, width], or [width] for a vector. Raises GradientsError for a name that is not there."""
        self.used.add(name)
        kept = self._kept.get(name)
        return self._keep(self._kept, name, self._read(name)) if kept is None else kept

    def get_half(self, name: str) -> torch.Tensor:
        """`get` in bfloat16. Values that `replace` put there do not count."""
        self.used.add(name)
        kept = self._halves.get(name)
        return self._keep(self._halves, name, self._read(name).bfloat16()) if kept is None else kept

    def _read(self, name: str) -> torch.Tensor:
        _, width = self.shape(name)
        tensor = self._file.tensors[name]
        values = torch.from_numpy(self._kernels.dequantize(self._file.read(tensor), tensor.type, width))
        return values.reshape(width) if len(tensor.shape) == 1 else values

    def _keep(self, kept: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> torch.Tensor:
        if values.nbytes <= self._room:
            self._room -= values.nbytes
            kept[name] = values
        return values

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Gives a tensor other values, of the shape that `get` returns. They stay in memory."""
        self._kept[name] = values

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, float32 [len(indices), width]."""
        self.used.add(name)
        kept = self._kept.get(name)
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
    def forward(ctx: Any, inputs: torch.Tensor, layers: "Layers", name: str) -> torch.Tensor:
        ctx.layers, ctx.name = layers, name
        ctx.tapped = name in layers.tapped
        if ctx.tapped:
            ctx.save_for_backward(inputs)
        return layers.multiply(inputs, name)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        layers, (gradient,) = ctx.layers, gradients
        if ctx.tapped:
            (inputs,) = ctx.saved_tensors
            layers.tap(ctx.name, inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        return (layers.back(gradient, ctx.name) if ctx.needs_input_grad[0] else None), None, None


class Layers:
    """Products with one model's weights; sequences are [batch, length, width].

    Parameters:
        weights: the weights.
        half: whether products are made in bfloat16.
    """

    def __init__(self, weights: TorchWeights, half: bool = False) -> None:
        self.weights = weights
        self.half = half
        self.tapped: Collection[str] = ()
        self.tap: Tap = nothing
        self.multiplied: dict[str, None] = {}  # weights in the order of their first use

    def multiply(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        """Inputs [..., n_in] times the transpose of a weight, float32."""
        if not self.half:
            return inputs @ self.weights.get(name).T
        return (inputs.bfloat16() @ self.weights.get_half(name).T).float()

    def back(self, gradient: torch.Tensor, name: str) -> torch.Tensor:
        """The derivative by the inputs of a weight, from that by its outputs: `gradient` times the weight."""
        if not self.half:
            return gradient @ self.weights.get(name)
        return (gradient.bfloat16() @ self.weights.get_half(name)).float()

    def linear(self, inputs: torch.Tensor, prefix: str) -> torch.Tensor:
        """Multiplies by PREFIX.weight and adds PREFIX.bias where the file has one."""
        self.multiplied.setdefault(f"{prefix}.weight")
        product: torch.Tensor = _Multiply.apply(inputs, self, f"{prefix}.weight")  # type: ignore[no-untyped-call]
        bias = f"{prefix}.bias"
        return product + self.weights.get(bias) if self.weights.has(bias) else product


def nothing(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
    """A tap that does nothing."""
    del name, inputs, gradient
