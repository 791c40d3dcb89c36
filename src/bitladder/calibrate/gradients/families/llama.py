"""Llama 1, 2, 3.x and their like; Qwen 2 and 3, which differ by biases, a norm of each head, and the kind of rope."""

import torch

from bitladder.calibrate.gradients.families.family import TorchFamily
from bitladder.calibrate.gradients.layers import Layers


class Llama(TorchFamily):
    """A norm before the attention and one before the feed-forward network."""

    name = "llama"
    interleaved = True
    takes_divisors = True
    norms_heads = False

    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """See `TorchFamily.block`."""
        prefix, sizes = f"blk.{block}", layers.sizes
        normed = layers.norm(stream, f"{prefix}.attn_norm")
        queries = layers.split_heads(layers.linear(normed, f"{prefix}.attn_q"), sizes.heads)
        keys = layers.split_heads(layers.linear(normed, f"{prefix}.attn_k"), sizes.kv_heads)
        values = layers.split_heads(layers.linear(normed, f"{prefix}.attn_v"), sizes.kv_heads)
        if self.norms_heads:
            queries = layers.norm(queries, f"{prefix}.attn_q_norm")
            keys = layers.norm(keys, f"{prefix}.attn_k_norm")
        mixed = layers.attend(queries, keys, values, tables)
        stream = stream + layers.linear(mixed, f"{prefix}.attn_output")
        return stream + layers.feed_forward(layers.norm(stream, f"{prefix}.ffn_norm"), prefix)


class Qwen2(Llama):
    """Llama with biases and halves rotated."""

    name = "qwen2"
    interleaved = False
    takes_divisors = False


class Qwen3(Llama):
    """Llama with a norm over each query and key head, and halves rotated."""

    name = "qwen3"
    interleaved = False
    takes_divisors = False
    norms_heads = True
