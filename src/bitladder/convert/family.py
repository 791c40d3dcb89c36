"""What the decoder-only architectures have in common; each family's own file says what is special about it."""

import abc
from typing import ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint import Config, Raw, Shape
from bitladder.convert.rope_config import describe_rope
from bitladder.errors import BitladderError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Family(abc.ABC):
    """One architecture, with the sizes of one model. Shapes are the checkpoint's: [rows (outputs), columns (inputs)].

    Raises BitladderError for a config that the architecture's graph in llama.cpp cannot run.
    """

    # The class names in config.json's `architectures`.
    names: ClassVar[tuple[str, ...]]
    arch: ClassVar[gguf.MODEL_ARCH]
    # Whether llama.cpp's graph divides the rotary frequencies by `rope_freqs.weight`.
    takes_rope_factors: ClassVar[bool]
    # Whether llama.cpp falls back to the embeddings where output.weight is absent.
    shares_embeddings: ClassVar[bool]

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab = config.integer("vocab_size")
        self.width = config.integer("hidden_size")
        self.inner = config.integer("intermediate_size")
        self.blocks = config.integer("num_hidden_layers")
        self.heads = config.integer("num_attention_heads")
        self.kv_heads = config.integer("num_key_value_heads", self.heads)
        self.head_dim = config.integer("head_dim", self.width // self.heads)
        self.tied = bool(config.get("tie_word_embeddings", False))
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise BitladderError(f"{config.path}: hidden_act {config.get('hidden_act')!r} is not supported, only silu")

    @abc.abstractmethod
    def block_shapes(self) -> dict[str, Shape]:
        """The tensors every block must have, by the name after `model.layers.N.`."""

    def optional_block_shapes(self) -> dict[str, Shape]:
        """The tensors a block may have (biases)."""
        return {}

    def arrange(self, name: str, raw: Raw) -> Raw:
        """A tensor's rows in the order llama.cpp wants them."""
        del name
        return raw

    def attention_shapes(self) -> dict[str, Shape]:
        """The four attention matrices and the three of the gated feed-forward network."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (queries, self.width),
            "self_attn.k_proj.weight": (keys, self.width),
            "self_attn.v_proj.weight": (keys, self.width),
            "self_attn.o_proj.weight": (self.width, queries),
            "mlp.gate_proj.weight": (self.inner, self.width),
            "mlp.up_proj.weight": (self.inner, self.width),
            "mlp.down_proj.weight": (self.width, self.inner),
        }

    def required(self) -> dict[str, Shape]:
        """Every tensor the checkpoint must have, in the order of the GGUF. A tied head is not among them."""
        shapes: dict[str, Shape] = {EMBEDDING: (self.vocab, self.width)}
        for block in range(self.blocks):
            shapes |= {f"model.layers.{block}.{name}": shape for name, shape in self.block_shapes().items()}
        shapes["model.norm.weight"] = (self.width,)
        if not self.tied:
            shapes[HEAD] = (self.vocab, self.width)
        return shapes

    def optional(self) -> dict[str, Shape]:
        """Every tensor the checkpoint may have besides."""
        return {
            f"model.layers.{block}.{name}": shape
            for block in range(self.blocks)
            for name, shape in self.optional_block_shapes().items()
        }

    def describe(self, writer: gguf.GGUFWriter) -> dict[str, NDArray[np.float32]]:
        """Write the hyper-parameters; return the tensors that exist only in the GGUF, by their GGUF names."""
        writer.add_block_count(self.blocks)
        writer.add_context_length(self.config.integer("max_position_embeddings"))
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(self.config.number("rms_norm_eps"))
        writer.add_vocab_size(self.vocab)
        writer.add_rope_dimension_count(self.head_dim)
        if self.config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        divisors = describe_rope(self.config, writer, self.head_dim, takes_factors=self.takes_rope_factors)
        return {} if divisors is None else {"rope_freqs.weight": divisors}
