"""Llama 1, 2, 3.x and models of the same shape (SmolLM2, TinyLlama…)."""

import gguf

from bitladder.convert.checkpoint import Raw, Shape
from bitladder.convert.family import Family


class Llama(Family):
    """llama.cpp rotates neighbouring pairs of a head's values, transformers the first half with the second.

    So the rows of the query and key matrices (and biases) are interleaved. Source: llama.cpp's `llama` graph, whose
    rope type is NORM.
    """

    names = ("LlamaForCausalLM", "LLaMAForCausalLM")
    arch = gguf.MODEL_ARCH.LLAMA
    takes_rope_factors = True
    shares_embeddings = True

    def block_shapes(self) -> dict[str, Shape]:
        """See `Family.block_shapes`: a norm before the attention and before the feed-forward network."""
        return {
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
            **self.attention_shapes(),
        }

    def optional_block_shapes(self) -> dict[str, Shape]:
        """See `Family.optional_block_shapes`: a bias for each matrix (attention_bias, mlp_bias)."""
        return {name.replace(".weight", ".bias"): (shape[0],) for name, shape in self.attention_shapes().items()}

    def arrange(self, name: str, raw: Raw) -> Raw:
        """See `Family.arrange`: interleave the halves of each query and key head."""
        part = name.split(".")[-2]
        if part == "q_proj":
            return interleave(raw, self.heads)
        return interleave(raw, self.kv_heads) if part == "k_proj" else raw


def interleave(raw: Raw, heads: int) -> Raw:
    """Rows (or biases) of each head from the order 0…d/2−1, d/2…d−1 to 0, d/2, 1, d/2+1, …; the shape stays."""
    halves = raw.reshape(heads, 2, -1, *raw.shape[1:])
    return halves.swapaxes(1, 2).reshape(raw.shape)
