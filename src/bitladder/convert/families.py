"""The architectures that are converted here: what decoder-only models have in common, and what is special to each.

A new architecture is a subclass of `Family` in `FAMILIES`.
"""

import abc
from collections.abc import Iterator
from typing import ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint import Raw
from bitladder.convert.checkpoint_files import Config, Shape, brief, plain
from bitladder.convert.rope import DEFAULT_CONTEXT, describe_rope
from bitladder.errors import BitladderError
from bitladder.progress import Progress

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# The keys of config.json that decide what the model computes.
READ = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "hidden_act",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
    ),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("original_max_position_embeddings", "bos_token_id", "eos_token_id"),
)
BIASES = {"self_attn": "attention_bias", "mlp": "mlp_bias"}


class Family(abc.ABC):
    """One architecture, with the sizes of one model. Shapes are the checkpoint's: [rows (outputs), columns (inputs)].

    Raises BitladderError for a config.json that llama.cpp's graph of the architecture cannot run.
    """

    # The class names in config.json's `architectures`, and its `model_type`, by which transformers chooses the class.
    names: ClassVar[tuple[str, ...]]
    model_type: ClassVar[str]
    # transformers' default of rms_norm_eps.
    default_eps: ClassVar[float]
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
        self.tied = config.boolean("tie_word_embeddings")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise BitladderError(
                f"{config.path}: hidden_act {brief(config.get('hidden_act'))} is not supported, only silu"
            )
        self.epsilon = config.number("rms_norm_eps", self.default_eps)
        if self.epsilon < 0:
            raise config.wrong("rms_norm_eps", "0 or more", self.epsilon)
        if self.heads % self.kv_heads:
            raise BitladderError(
                f"{config.path}: num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise BitladderError(f"{config.path}: heads of {self.head_dim} values cannot be rotated in pairs")

    @abc.abstractmethod
    def block_shapes(self) -> dict[str, Shape]:
        """The tensors that every block must have, by the name after `model.layers.N.`."""

    def optional_block_shapes(self) -> dict[str, Shape]:
        """The tensors that a block may have (biases). transformers takes those that are missing for zero."""
        return {}

    def arrange(self, name: str, raw: Raw) -> Raw:
        """A tensor with its rows in the order of llama.cpp."""
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

    def required(self) -> Iterator[tuple[str, Shape]]:
        """The tensors that the checkpoint must have, in the order of the GGUF. A tied head is not among them.

        They are made one by one, because config.json can say any number of blocks.
        """
        yield EMBEDDING, (self.vocab, self.width)
        for block in range(self.blocks):
            for name, shape in self.block_shapes().items():
                yield f"model.layers.{block}.{name}", shape
        yield "model.norm.weight", (self.width,)
        if not self.tied:
            yield HEAD, (self.vocab, self.width)

    def optional(self) -> Iterator[tuple[str, Shape]]:
        """The tensors that the checkpoint may have besides."""
        if self.tied:
            yield HEAD, (self.vocab, self.width)
        for block in range(self.blocks):
            for name, shape in self.optional_block_shapes().items():
                yield f"model.layers.{block}.{name}", shape

    def describe(self, writer: gguf.GGUFWriter, progress: Progress) -> dict[str, NDArray[np.float32]]:
        """Writes the hyper-parameters. Returns the tensors that only the GGUF has, by their names there."""
        writer.add_block_count(self.blocks)
        writer.add_context_length(self.config.integer("max_position_embeddings", DEFAULT_CONTEXT))
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_vocab_size(self.vocab)
        writer.add_rope_dimension_count(self.head_dim)
        if self.config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        divisors = describe_rope(
            self.config, writer, self.head_dim, takes_factors=self.takes_rope_factors, progress=progress
        )
        return {} if divisors is None else {"rope_freqs.weight": divisors}


class LlamaFamily(Family):
    """Llama 1, 2, 3.x and models of the same shape (SmolLM2, TinyLlama…).

    llama.cpp's `llama` graph rotates neighbouring pairs of a head's values (rope type NORM). transformers rotates the
    first half with the second. The rows of the query and key matrices, and their biases, are therefore interleaved.
    """

    names = ("LlamaForCausalLM", "LLaMAForCausalLM")
    model_type = "llama"
    default_eps = 1e-6
    arch = gguf.MODEL_ARCH.LLAMA
    takes_rope_factors = True
    shares_embeddings = True

    def block_shapes(self) -> dict[str, Shape]:
        """See `Family.block_shapes`. Norms stand before the attention and before the feed-forward network."""
        return {
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
            **self.attention_shapes(),
        }

    def optional_block_shapes(self) -> dict[str, Shape]:
        """See `Family.optional_block_shapes`. The matrices have biases by attention_bias and mlp_bias."""
        biased = [part for part, key in BIASES.items() if self.config.boolean(key)]
        return {
            name.replace(".weight", ".bias"): (shape[0],)
            for name, shape in self.attention_shapes().items()
            if name.partition(".")[0] in biased
        }

    def arrange(self, name: str, raw: Raw) -> Raw:
        """See `Family.arrange`. The halves of each query and key head are interleaved."""
        part = name.split(".")[-2]
        if part == "q_proj":
            return interleave(raw, self.heads)
        return interleave(raw, self.kv_heads) if part == "k_proj" else raw


class Olmo2Family(Family):
    """OLMo 2: norms after the attention and the feed-forward network, and over all queries and all keys at once.

    llama.cpp's `olmo2` graph rotates halves (rope type NEOX) as transformers does, so rows keep their order. It needs
    heads of hidden_size / heads values, has no biases, and needs output.weight even where the head is tied.
    """

    names = ("Olmo2ForCausalLM",)
    model_type = "olmo2"
    default_eps = 1e-5
    arch = gguf.MODEL_ARCH.OLMO2
    takes_rope_factors = False
    shares_embeddings = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.head_dim * self.heads != self.width:
            raise BitladderError(f"{config.path}: llama.cpp's olmo2 needs head_dim = hidden_size / num_attention_heads")
        if config.boolean("attention_bias"):
            raise BitladderError(f"{config.path}: attention_bias is true, but llama.cpp's olmo2 has no biases")

    def block_shapes(self) -> dict[str, Shape]:
        """See `Family.block_shapes`."""
        return {
            "post_attention_layernorm.weight": (self.width,),
            "post_feedforward_layernorm.weight": (self.width,),
            "self_attn.q_norm.weight": (self.heads * self.head_dim,),
            "self_attn.k_norm.weight": (self.kv_heads * self.head_dim,),
            **self.attention_shapes(),
        }


FAMILIES: tuple[type[Family], ...] = (LlamaFamily, Olmo2Family)


def family_for(config: Config) -> Family:
    """The family of a model, with its sizes.

    transformers chooses the class by `model_type`. `architectures` must name the same; each may be missing.

    Raises BitladderError if no family has the architecture, or if two places say different things.
    """
    family, names, kind = named_family(config), architectures(config), config.get("model_type")
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.names[:1])
        described = ", ".join(names) or (f"of model_type {kind}" if isinstance(kind, str) else "not given")
        raise BitladderError(
            f"{config.path}: architecture {plain(described)} is not one that bitladder converts"
            f" ({known}); --upstream runs llama.cpp's own converter instead"
        )
    if kind not in (None, family.model_type):
        raise BitladderError(
            f"{config.path}: architectures names {brief(', '.join(names))}, but model_type, which transformers"
            f" goes by, is {brief(kind)}; correct the one that is wrong"
        )
    _check_nested(config)
    return family(config)


def named_family(config: Config) -> type[Family] | None:
    """The family that `architectures` names, or `model_type` if that is missing; None if bitladder does not know it."""
    names = architectures(config)
    for family in FAMILIES:
        if any(name in family.names for name in names) or (not names and config.get("model_type") == family.model_type):
            return family
    return None


def architectures(config: Config) -> list[str]:
    """The class names in `architectures`."""
    names = config.get("architectures", [])
    names = [names] if isinstance(names, str) else names
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _check_nested(config: Config) -> None:
    """Raises BitladderError if `text_config`, where models of several kinds keep such values, says something else."""
    nested = config.get("text_config")
    if nested is None:
        return
    if not isinstance(nested, dict):
        raise config.wrong("text_config", "an object", nested)
    for key in READ:
        if nested.get(key) is not None and nested[key] != config.get(key):
            raise BitladderError(
                f"{config.path}: text_config.{key} is {brief(nested[key])}, but {key} at the top is"
                f" {brief(config.get(key))}; a text model has its values at the top"
            )


def interleave(raw: Raw, heads: int) -> Raw:
    """Rows (or biases) of each head from the order 0…d/2−1, d/2…d−1 to 0, d/2, 1, d/2+1, …; the shape stays."""
    halves = raw.reshape(heads, 2, -1, *raw.shape[1:])
    return halves.swapaxes(1, 2).reshape(raw.shape)
