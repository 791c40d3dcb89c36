"""The hyper-parameters of a model file that its forward pass needs."""

import dataclasses
import math

from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the first `dimensions` values of a head. The names are GGUF's.

    `interleaved` pairs neighbours (llama.cpp's NORM); otherwise the first half is paired with the second (NEOX).
    """

    dimensions: int
    base: float
    interleaved: bool
    scaling: str = "none"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a forward pass needs to know. `head_dim` is the size of queries, keys and values alike."""

    architecture: str
    blocks: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    rope: Rope


def read_hyperparameters(file: GgufFile, *, interleaved: bool) -> Hyperparameters:
    """Reads an open model's header.

    Parameters:
        file: the model.
        interleaved: which pairs the architecture rotates (see Rope).

    Raises:
        BitladderError: a key is missing or not supported.
    """
    arch = file.architecture

    def integer(key: str, default: int | None = None) -> int:
        value = file.get(f"{arch}.{key}", default)
        if isinstance(value, list) and value and all(number == value[0] for number in value):
            value = value[0]  # some converters write one number per block
        if not isinstance(value, int) or value < 1:
            raise BitladderError(f"{file.path.name}: {arch}.{key} is {value!r}; gradients need one positive number")
        return value

    def number(key: str, default: float) -> float:
        value = file.get(f"{arch}.{key}", default)
        if not isinstance(value, int | float):
            raise BitladderError(f"{file.path.name}: {arch}.{key} is {value!r}, which is not a number")
        return float(value)

    for key in ("attention.sliding_window", "expert_count", "rope.scaling.yarn_log_multiplier", "logit_scale"):
        if file.get(f"{arch}.{key}"):
            raise BitladderError(f"{file.path.name}: {arch}.{key} is set, which the torch forward pass does not know")
    width, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", width // heads)
    rotated = integer("rope.dimension_count", head_dim)
    if integer("attention.value_length", head_dim) != head_dim or rotated != head_dim:
        raise BitladderError(
            f"{file.path.name}: keys, values and rope should have one size per head ({head_dim}) for gradients"
        )
    scaling = str(file.get(f"{arch}.rope.scaling.type", "none"))
    if scaling not in {"none", "linear", "yarn"}:
        raise BitladderError(f"{file.path.name}: rope scaling {scaling!r} is not known to the torch forward pass")
    rope = Rope(
        rotated,
        number("rope.freq_base", 10000.0),
        interleaved,
        scaling,
        # The library reads the factor even where the type says that there is none.
        number("rope.scaling.factor", number("rope.scale_linear", 1.0)) or 1.0,
        number("rope.scaling.attn_factor", 1.0),
        integer("rope.scaling.original_context_length", integer("context_length", 1)),
        number("rope.scaling.yarn_beta_fast", 32.0),
        number("rope.scaling.yarn_beta_slow", 1.0),
    )
    return Hyperparameters(
        arch,
        integer("block_count"),
        width,
        heads,
        integer("attention.head_count_kv", heads),
        head_dim,
        number("attention.layer_norm_rms_epsilon", 1e-5),
        number("attention.scale", 0.0) or 1.0 / math.sqrt(head_dim),
        rope,
    )
