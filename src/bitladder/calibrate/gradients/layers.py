"""Products with the weights of a file, and the tap that sees them."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from bitladder.calibrate.gradients.torch_weights import TorchWeights

# What a tap is shown during the backward pass: a weight's name, its input [tokens, n_in], and the gradient of the
# objective with respect to its output [tokens, n_out].
Tap = Callable[[str, torch.Tensor, torch.Tensor], None]


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
