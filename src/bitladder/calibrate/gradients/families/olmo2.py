"""OLMo 2."""

import torch

from bitladder.calibrate.gradients.families.family import TorchFamily
from bitladder.calibrate.gradients.layers import Layers


class Olmo2(TorchFamily):
    """Norms after the attention and the feed-forward network, and over all queries and all keys at once."""

    name = "olmo2"
    interleaved = False

    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """See `TorchFamily.block`."""
        prefix, sizes = f"blk.{block}", layers.sizes
        queries = layers.norm(layers.linear(stream, f"{prefix}.attn_q"), f"{prefix}.attn_q_norm")
        keys = layers.norm(layers.linear(stream, f"{prefix}.attn_k"), f"{prefix}.attn_k_norm")
        values = layers.linear(stream, f"{prefix}.attn_v")
        mixed = layers.attend(
            layers.split_heads(queries, sizes.heads),
            layers.split_heads(keys, sizes.kv_heads),
            layers.split_heads(values, sizes.kv_heads),
            tables,
        )
        mixed = layers.linear(mixed, f"{prefix}.attn_output")
        stream = stream + layers.norm(mixed, f"{prefix}.post_attention_norm")
        return stream + layers.norm(layers.feed_forward(stream, prefix), f"{prefix}.post_ffw_norm")
