"""The operations that the families' forward passes are made of, and the tap that sees their multiplications.

Rotary position embedding is computed as ggml does (ggml_rope_ext).
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn import functional

from bitladder.calibrate.gradients.hyperparameters import Hyperparameters, Rope
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
    """The operations of a forward pass over one model's weights; sequences are [batch, length, width]."""

    def __init__(self, weights: TorchWeights, hyperparameters: Hyperparameters) -> None:
        self.weights = weights
        self.hyperparameters = hyperparameters
        self.tapped: Collection[str] = ()
        self.tap: Tap = nothing
        self.half = False  # products with weights are made in bfloat16
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

    def norm(self, inputs: torch.Tensor, prefix: str) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, times PREFIX.weight."""
        scale = torch.rsqrt(inputs.square().mean(-1, keepdim=True) + self.hyperparameters.eps)
        return inputs * scale * self.weights.get(f"{prefix}.weight")

    def split_heads(self, values: torch.Tensor, heads: int) -> torch.Tensor:
        """[batch, length, heads × head_dim] to [batch, heads, length, head_dim]."""
        return values.view(*values.shape[:2], heads, self.hyperparameters.head_dim).transpose(1, 2)

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
        model = self.hyperparameters
        queries = rotate(queries, tables, interleaved=model.rope.interleaved)
        keys = rotate(keys, tables, interleaved=model.rope.interleaved)
        group = model.heads // model.kv_heads
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=model.scale)
        return mixed.transpose(1, 2).flatten(2)

    def feed_forward(self, inputs: torch.Tensor, block: str) -> torch.Tensor:
        """down(silu(gate(x)) · up(x))."""
        gate = functional.silu(self.linear(inputs, f"{block}.ffn_gate"))
        return self.linear(gate * self.linear(inputs, f"{block}.ffn_up"), f"{block}.ffn_down")


def nothing(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
    """A tap that does nothing."""
    del name, inputs, gradient


def rope_tables(rope: Rope, length: int, divisors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angles at positions 0 … length−1, float32 [length, dimensions / 2] each.

    YaRN (arXiv 2309.00071) stretches low frequencies by the factor, leaves high ones, and mixes both in between.

    Parameters:
        rope: the kind of embedding.
        length: positions.
        divisors: of the frequencies, [dimensions / 2] (a file's rope_freqs), or None.
    """
    pairs = torch.arange(0, rope.dimensions, 2, dtype=torch.float64)
    frequencies = rope.base ** (-pairs / rope.dimensions)
    if divisors is not None:
        frequencies = frequencies / divisors.to(torch.float64)
    stretched = frequencies / rope.factor
    magnitude = rope.attention_factor
    if rope.scaling == "yarn":
        keep = _ramp(rope)
        frequencies = stretched * (1 - keep) + frequencies * keep
        magnitude *= 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
    else:
        frequencies = stretched
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def _ramp(rope: Rope) -> torch.Tensor:
    """How much of its own frequency each pair keeps under YaRN: 1 for the fastest, 0 for the slowest."""

    def pair(turns: float) -> float:
        # The pair that turns as often over the original context.
        ratio = rope.original_context / (turns * 2 * math.pi)
        return rope.dimensions * math.log(ratio) / (2 * math.log(rope.base))

    low = max(0.0, math.floor(pair(rope.beta_fast)))
    high = min(rope.dimensions - 1.0, math.ceil(pair(rope.beta_slow)))
    position = torch.arange(rope.dimensions // 2, dtype=torch.float64)
    return 1 - ((position - low) / max(0.001, high - low)).clamp(0, 1)


def rotate(values: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], *, interleaved: bool) -> torch.Tensor:
    """Rotates the pairs of [..., length, dimensions] by each position's angles.

    Example:
        >>> quarter = torch.zeros(1, 1), torch.ones(1, 1)
        >>> rotate(torch.tensor([[1.0, 0.0]]), quarter, interleaved=True).tolist()
        [[0.0, 1.0]]
    """
    cosines, sines = tables
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = values.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
