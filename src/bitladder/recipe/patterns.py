"""Patterns and presets as llama-quantize understands them.

It (tools/quantize/quantize.cpp, src/llama-quant.cpp) puts a pattern in lower case and searches it anywhere in a
tensor's name as an ECMAScript regular expression; the first pattern that is found decides. Patterns apply to embedding
and head too, but to nothing if the preset's own type is not a quantized one, and never to tensors that the library
leaves alone.
"""

import collections
import string
from collections.abc import Mapping

from bitladder.engine.presets import ALIASES, plain_type, preset_number, presets
from bitladder.engine.types import TensorType, type_by_name
from bitladder.gguf.names import around_block, reading_order

_NOT_MADE = {"NVFP4"}  # a name for converted files: llama_model_quantize refuses it
_PLAIN = set(string.ascii_lowercase + string.digits + "_-/")


def exact_patterns(types: Mapping[str, TensorType]) -> tuple[tuple[str, TensorType], ...]:
    """std::regex patterns that give exactly the named tensors exactly their types; no tensor matches two of them.

    One takes all tensors of a kind together that have one type: ("^blk\\.(0|3)\\.attn_v\\.weight$", q6_K). A thousand
    tensors searched for a thousand patterns would take std::regex seconds.
    """
    groups: dict[tuple[str, str, TensorType], list[str]] = collections.defaultdict(list)
    for name in sorted(types, key=reading_order):
        before, layer, after = around_block(name) or (name, "", "")
        groups[before, after, types[name]].append(layer)
    return tuple((f"^{_pattern(before, layers, after)}$", kind) for (before, after, kind), layers in groups.items())


def preset_and_pairs(tensors: Mapping[str, str], preset: str | None) -> tuple[str, tuple[tuple[str, TensorType], ...]]:
    """What to ask llama-quantize for, so that `preset` decides all tensors that are not named.

    A preset that does not quantize takes no patterns; another stands in for it, and a last pattern for all the rest
    does what it would have done. Raises BitladderError for a type that the library does not know, and as `base_preset`.
    """
    rest = plain_type(preset) if preset is not None else None
    pairs = exact_patterns({name: type_by_name(kind) for name, kind in tensors.items()})
    return base_preset(tensors, preset), (*pairs, (".*", rest)) if rest is not None else pairs


def base_preset(tensors: Mapping[str, str], preset: str | None) -> str:
    """The preset to give llama-quantize beside the patterns: `preset`, or one of the commonest quantized type.

    It has to be one whose own type is quantized; it decides the types of tensors that match none. Raises
    BitladderError if the library knows no preset, or no type, of that name.
    """
    if preset is not None and (own := preset_name(preset)) not in _NOT_MADE and plain_type(own) is None:
        return own
    for kind, _ in collections.Counter(map(type_by_name, tensors.values())).most_common():
        name = ALIASES.get(kind.name.upper(), kind.name.upper())
        if kind.quantized and name in presets() and name not in _NOT_MADE:
            return name
    return "Q8_0"


def preset_name(preset: str) -> str:
    """A preset as the library names it ("q4_k" → "Q4_K_M"). Raises BitladderError if it knows none of that name."""
    number = preset_number(preset)
    return next(name for name, known in presets().items() if known == number)


def _pattern(before: str, layers: list[str], after: str) -> str:
    middle = "" if layers == [""] else layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
    return _escaped(before) + middle + _escaped(after)


def _escaped(text: str) -> str:
    """A pattern for these characters that survives being put in lower case and cut at "=" and whitespace."""
    return "".join(
        one if one in _PLAIN or not one.isascii() else "\\." if one == "." else f"\\x{ord(one):02x}" for one in text
    )
