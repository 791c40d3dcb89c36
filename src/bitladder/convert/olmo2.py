"""OLMo 2."""

import gguf

from bitladder.convert.checkpoint import Config, Shape
from bitladder.convert.family import Family
from bitladder.errors import BitladderError


class Olmo2(Family):
    """Norms after the attention and the feed-forward network, and over all queries and all keys at once.

    llama.cpp's `olmo2` graph rotates halves (rope type NEOX) as transformers does, so nothing is permuted. It wants
    heads of hidden_size / heads values, has no biases, and needs output.weight even where the head is tied.
    """

    names = ("Olmo2ForCausalLM",)
    arch = gguf.MODEL_ARCH.OLMO2
    takes_rope_factors = False
    shares_embeddings = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.head_dim * self.heads != self.width:
            raise BitladderError(f"{config.path}: llama.cpp's olmo2 needs head_dim = hidden_size / num_attention_heads")

    def block_shapes(self) -> dict[str, Shape]:
        """See `Family.block_shapes`."""
        return {
            "post_attention_layernorm.weight": (self.width,),
            "post_feedforward_layernorm.weight": (self.width,),
            "self_attn.q_norm.weight": (self.heads * self.head_dim,),
            "self_attn.k_norm.weight": (self.kv_heads * self.head_dim,),
            **self.attention_shapes(),
        }
