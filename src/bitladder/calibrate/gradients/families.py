"""How a block of each architecture family computes, in torch.

A further architecture is a class here and its name in FAMILIES. Its logits are compared with the library's before any
gradient is used (`usable.check_logits`).
"""

import abc
from typing import ClassVar

import torch

from bitladder.calibrate.gradients.layers import Layers


class TorchFamily(abc.ABC):
    """An architecture of llama.cpp's.

    `name` is its general.architecture; `interleaved` its kind of rope; `takes_divisors` says whether its graph divides
    the rotary frequencies by a `rope_freqs` tensor.
    """

    name: ClassVar[str]
    interleaved: ClassVar[bool]
    takes_divisors: ClassVar[bool] = False

    @abc.abstractmethod
    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The residual stream [batch, length, width] after a block.

        Parameters:
            layers: the operations, and the model's weights.
            block: the block's number.
            stream: the residual stream before it.
            tables: of the rope, see `rope_tables`.
        """


class TorchLlama(TorchFamily):
    """Llama 1, 2, 3.x and similar: a norm before the attention and one before the feed-forward network."""

    name = "llama"
    interleaved = True
    takes_divisors = True
    norms_heads = False

    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """See `TorchFamily.block`."""
        prefix, heads = f"blk.{block}", layers.hyperparameters
        normed = layers.norm(stream, f"{prefix}.attn_norm")
        queries = layers.split_heads(layers.linear(normed, f"{prefix}.attn_q"), heads.heads)
        keys = layers.split_heads(layers.linear(normed, f"{prefix}.attn_k"), heads.kv_heads)
        values = layers.split_heads(layers.linear(normed, f"{prefix}.attn_v"), heads.kv_heads)
        if self.norms_heads:
            queries = layers.norm(queries, f"{prefix}.attn_q_norm")
            keys = layers.norm(keys, f"{prefix}.attn_k_norm")
        mixed = layers.attend(queries, keys, values, tables)
        stream = stream + layers.linear(mixed, f"{prefix}.attn_output")
        return stream + layers.feed_forward(layers.norm(stream, f"{prefix}.ffn_norm"), prefix)


class TorchQwen2(TorchLlama):
    """Llama with biases and halves rotated."""

    name = "qwen2"
    interleaved = False
    takes_divisors = False


class TorchQwen3(TorchLlama):
    """Llama with a norm over each query and key head, and halves rotated."""

    name = "qwen3"
    interleaved = False
    takes_divisors = False
    norms_heads = True


class TorchOlmo2(TorchFamily):
    """OLMo 2: norms after the attention and the feed-forward network, and over all queries and all keys at once."""

    name = "olmo2"
    interleaved = False

    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """See `TorchFamily.block`."""
        prefix, heads = f"blk.{block}", layers.hyperparameters
        queries = layers.norm(layers.linear(stream, f"{prefix}.attn_q"), f"{prefix}.attn_q_norm")
        keys = layers.norm(layers.linear(stream, f"{prefix}.attn_k"), f"{prefix}.attn_k_norm")
        values = layers.linear(stream, f"{prefix}.attn_v")
        mixed = layers.attend(
            layers.split_heads(queries, heads.heads),
            layers.split_heads(keys, heads.kv_heads),
            layers.split_heads(values, heads.kv_heads),
            tables,
        )
        mixed = layers.linear(mixed, f"{prefix}.attn_output")
        stream = stream + layers.norm(mixed, f"{prefix}.post_attention_norm")
        return stream + layers.norm(layers.feed_forward(stream, prefix), f"{prefix}.post_ffw_norm")


FAMILIES: dict[str, type[TorchFamily]] = {kind.name: kind for kind in (TorchLlama, TorchOlmo2, TorchQwen2, TorchQwen3)}
