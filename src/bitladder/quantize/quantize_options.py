"""The options of llama-quantize as values, and how they are written."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from bitladder.engine.presets import preset_number, storable
from bitladder.engine.types import TensorType, all_types, type_by_name
from bitladder.errors import BitladderError, UsageError

COPY = "COPY"
# llama_model_kv_override has 128 bytes for a key and for a string, each with its final zero.
_LIMIT = 127
_F32_MAX = float(np.finfo(np.float32).max)
_NOT_TO_OVERRIDE = ("general.alignment", "split.no", "split.count", "split.tensors.count")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """What to make of a model; see docs/recipes.md for what each option does.

    `preset` and `types` (a recipe: exact tensor name → type): at least one is needed. `tensor_types` are (pattern,
    type) in the order given, the first that is found in a name decides. `override_kv` are "KEY=TYPE:VALUE".
    `split_max_bytes` is the largest size of a shard, None for one file.
    """

    preset: str | None = None
    types: Mapping[str, str] | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    override_kv: tuple[str, ...] = ()
    prune_layers: tuple[int, ...] = ()
    no_fallback: bool = False
    keep_split: bool = False
    split_max_bytes: int | None = None

    @property
    def copies(self) -> bool:
        """Whether the preset is COPY: tensors stay as they are."""
        return self.preset is not None and self.preset.upper() == COPY


def check_options(options: QuantizeOptions) -> None:
    """Refuse what cannot be meant, before a file is opened. Raises UsageError that names the option."""
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


def target_type(name: str, where: str) -> TensorType:
    """The type of that name, if weights can be stored as it. Raises UsageError that names `where` it was asked for."""
    try:
        kind = type_by_name(name)
    except BitladderError:
        kind = None
    if kind is None or not storable(kind):
        known = ", ".join(one.name for one in all_types().values() if storable(one))
        raise UsageError(f"{where}: {name!r} is no type that weights can be stored as; the library has {known}")
    return kind


def parse_tensor_type(text: str) -> tuple[str, str]:
    """PATTERN=TYPE as (pattern, type), cut at the first "=" as llama-quantize cuts it. Raises UsageError."""
    pattern, equals, kind = text.partition("=")
    if not pattern or not equals or not kind:
        raise UsageError(f"--tensor-type {text}: write PATTERN=TYPE, such as attn_v=q6_k")
    if "=" in kind:
        raise UsageError(
            f'--tensor-type {text}: a pattern cannot hold "=" (no look-ahead), as the type follows the first one'
        )
    target_type(kind, f"--tensor-type {text}")
    return pattern, kind


def read_tensor_types(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The entries PATTERN=TYPE of a --tensor-type-file: words separated by spaces or newlines.

    Raises UsageError that names the file, and the entry that is none.
    """
    try:
        words = pathlib.Path(path).read_text(encoding="utf-8").split()
    except OSError as error:
        raise UsageError(f"--tensor-type-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--tensor-type-file {path} is not a text file") from error
    for word in words:
        try:
            parse_tensor_type(word)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return tuple(words)


def parse_override(text: str) -> tuple[str, int | float | bool | str]:
    """KEY=TYPE:VALUE (int, float, bool, str) as (key, value).

    As llama-quantize writes them: an int becomes an unsigned 32-bit number without its sign, a float has 32 bits, a
    string at most 127 bytes. Raises UsageError that says what is wrong; llama-quantize takes a value that is no number
    for 0.
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
