"""What the families' forward passes are made of, and where a pass looks at the multiplications."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn import functional

from bitladder.calibrate.gradients.hyperparameters import Sizes
from bitladder.calibrate.gradients.rope import rotate
from bitladder.calibrate.gradients.torch_weights import TorchWeights

# What a tap is shown during the backward pass: a weight's name, its input [tokens, n_in], and the gradient of the
# objective with respect to its output [tokens, n_out].
Tap = Callable[[str, torch.Tensor, torch.Tensor], None]


class _Multiply(torch.autograd.Function):
    """y = x Wᵀ. W is fetched when it is needed, not kept in the graph, and x is kept only if the tap wants it."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layers: "Layers", name: str) -> torch.Tensor:
        ctx.layers, ctx.name = layers, name
        ctx.tapped = name in layers.wanted
        if ctx.tapped:
            ctx.save_for_backward(inputs)
        return inputs @ layers.weights.get(name).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        layers, (gradient,) = ctx.layers, gradients
        if ctx.tapped:
            (inputs,) = ctx.saved_tensors
            layers.tap(ctx.name, inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        return (gradient @ layers.weights.get(ctx.name) if ctx.needs_input_grad[0] else None), None, None


class Layers:
    """The operations of a forward pass over one model's weights; sequences are [batch, length, width]."""

    def __init__(self, weights: TorchWeights, sizes: Sizes) -> None:
        self.weights = weights
        self.sizes = sizes
        self.wanted: Collection[str] = ()
        self.tap: Tap = nothing
        self.multiplied: dict[str, None] = {}  # weights in the order of their first use

    def linear(self, inputs: torch.Tensor, prefix: str) -> torch.Tensor:
        """Multiply by PREFIX.weight and add PREFIX.bias where the file has one."""
        self.multiplied.setdefault(f"{prefix}.weight")
        product: torch.Tensor = _Multiply.apply(inputs, self, f"{prefix}.weight")  # type: ignore[no-untyped-call]
        bias = f"{prefix}.bias"
        return product + self.weights.get(bias) if self.weights.has(bias) else product

    def norm(self, inputs: torch.Tensor, prefix: str) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, times PREFIX.weight."""
        scale = torch.rsqrt(inputs.square().mean(-1, keepdim=True) + self.sizes.eps)
        return inputs * scale * self.weights.get(f"{prefix}.weight")

    def split_heads(self, values: torch.Tensor, heads: int) -> torch.Tensor:
        """[batch, length, heads × head_dim] to [batch, heads, length, head_dim]."""
        return values.view(*values.shape[:2], heads, self.sizes.head_dim).transpose(1, 2)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Causal attention with rotated queries and keys, [batch, heads or kv_heads, length, head_dim] each.

        Returns [batch, length, heads × head_dim]. Query head h reads KV head h // (heads / kv_heads).
        """
        sizes = self.sizes
        queries = rotate(queries, tables, interleaved=sizes.rope.interleaved)
        keys = rotate(keys, tables, interleaved=sizes.rope.interleaved)
        group = sizes.heads // sizes.kv_heads
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=sizes.scale)
        return mixed.transpose(1, 2).flatten(2)

    def feed_forward(self, inputs: torch.Tensor, block: str) -> torch.Tensor:
        """down(silu(gate(x)) · up(x))."""
        gate = functional.silu(self.linear(inputs, f"{block}.ffn_gate"))
        return self.linear(gate * self.linear(inputs, f"{block}.ffn_up"), f"{block}.ffn_down")


def nothing(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
    """A tap that looks away."""
    del name, inputs, gradient
