"""The options of llama-quantize."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitladder.engine import preset_number, presets
from bitladder.errors import UsageError
from bitladder.options import Options, option

COPY = "COPY"
AS_PRESET = "preset"  # of --unreached-type
# The usual ladder, from the smallest to the largest.
RUNGS = (
    "IQ3_S",
    "IQ3_M",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_NL",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)
# Ladders by name. Makers of quants publish about the second; the third is for models that hardly fit.
LADDERS = {
    "seed": RUNGS,
    "publish": ("Q2_K", "IQ3_XXS", "IQ3_XS", *RUNGS[1:5], "IQ4_XS", *RUNGS[5:]),
    "low": ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S"),
}
# llama_model_kv_override has 128 bytes for a key and for a string, each with its final zero.
_LIMIT = 127
_F32_MAX = float(np.finfo(np.float32).max)
_NOT_TO_OVERRIDE = ("general.alignment", "split.no", "split.count", "split.tensors.count")


def unreached_option(*, or_preset: bool = False, **more: Any) -> Any:
    """The option --unreached-type, which several commands have; `more` as for `options.option`."""
    words = "Type of prediction heads (MTP, NextN), which no text reaches"
    words += f"; {AS_PRESET}: as llama-quantize." if or_preset else "."
    return option("q8_0", "--unreached-type", metavar="TYPE", help=words, **more)


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(Options):
    """How to quantize a model, with llama-quantize's options; docs/recipes.md says what each does."""

    GROUP = "Types and metadata"

    preset: str | None = option(None, help="Name of a preset; None for the recipe alone.")
    types: Mapping[str, str] | None = option(
        None, help="A recipe: exact tensor name → type; None for the preset alone."
    )
    tensor_types: tuple[str, ...] = option(
        (),
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the tensors whose name contains the pattern; the first pattern that matches decides.",
    )
    output_tensor_type: str | None = option(None, "--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
    token_embedding_type: str | None = option(
        None, "--token-embedding-type", metavar="TYPE", help="Type of the token embeddings."
    )
    pure: bool = option(False, "--pure", help="The preset's own type for all tensors, no mixture.")
    leave_output_tensor: bool = option(False, "--leave-output-tensor", help="Keep output.weight as it is.")
    allow_requantize: bool = option(False, "--allow-requantize", help="Accept a quantized model too; quality suffers.")
    include_weights: tuple[str, ...] = option(
        (), "--include-weights", metavar="NAME", help="Use the imatrix only for these weights."
    )
    exclude_weights: tuple[str, ...] = option(
        (), "--exclude-weights", metavar="NAME", help="Do not use the imatrix for these weights."
    )
    override_kv: tuple[str, ...] = option(
        (), "--override-kv", metavar="KEY=TYPE:VALUE", help="Metadata to set (int, float, bool, str)."
    )
    prune_layers: tuple[int, ...] = option((), help="Numbers of the blocks to leave out.")
    unreached_type: str = unreached_option(or_preset=True)
    no_fallback: bool = option(
        False, "--no-fallback", help="Stop where a width cannot hold the type, and use no other instead."
    )
    keep_split: bool = option(False, "--keep-split", help="Write the same shards as the input has.")
    split_max_bytes: int | None = option(None, help="Largest size of a shard; None for one file.")

    @property
    def copies(self) -> bool:
        """Whether the preset is COPY: tensors stay as they are."""
        return self.preset is not None and self.preset.upper() == COPY


def check_options(options: QuantizeOptions) -> None:
    """Raises UsageError that names the option, for options that contradict each other."""
    if options.preset is None and options.types is None:
        raise UsageError("name a preset (Q4_K_M, …) or a recipe (--recipe)")
    if options.preset is not None and not options.copies:
        preset_number(options.preset)
    if options.copies and options.types is not None:
        raise UsageError("COPY changes no tensor; leave out either COPY or the recipe")
    if options.include_weights and options.exclude_weights:
        raise UsageError("--include-weights and --exclude-weights cannot be used together")
    if options.keep_split and options.split_max_bytes is not None:
        raise UsageError("--keep-split and --split-max-size cannot be used together")
    if "" in (*options.include_weights, *options.exclude_weights):
        raise UsageError("--include-weights and --exclude-weights need a part of a tensor's name")
    for text in options.override_kv:
        parse_override(text)
    if any(layer < 0 for layer in options.prune_layers):
        raise UsageError("--prune-layers: block numbers begin at 0")


def parse_override(text: str) -> tuple[str, int | float | bool | str]:
    """KEY=TYPE:VALUE (int, float, bool, str) as (key, value).

    llama-quantize writes an int as an unsigned 32-bit number without its sign, a float with 32 bits, and a string of at
    most 127 bytes. It reads a value that is not a number as 0; here that is an error. Raises UsageError.
    """
    where = f"--override-kv {text}"
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not (key and equals and colon) or len(key.encode()) > _LIMIT:
        raise UsageError(f"{where}: write KEY=TYPE:VALUE, such as llama.context_length=int:4096")
    if key in _NOT_TO_OVERRIDE:
        raise UsageError(f"{where}: {key} follows from how the file is written")
    if kind == "str" and len(value.encode()) <= _LIMIT:
        return key, value
    if kind == "bool" and value in ("true", "false"):
        return key, value == "true"
    try:
        if kind == "int" and abs(int(value)) < 1 << 32:
            return key, int(value)
        if kind == "float" and abs(float(value)) <= _F32_MAX:
            return key, float(value)
    except ValueError:
        pass
    raise UsageError(
        f"{where}: TYPE:VALUE is int:N (32 bits), float:X, bool:true, bool:false or str:TEXT (at most {_LIMIT} bytes)"
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """The block numbers of --prune-layers L0,L1,…, in order. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--prune-layers {text}: write block numbers with commas, such as 3,7,11")
    return tuple(sorted({int(part) for part in parts}))


def preset_names() -> list[str]:
    """The names of all presets of the library."""
    return sorted(presets())
