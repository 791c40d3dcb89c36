"""One quant: a GGUF and a type for each tensor in, a GGUF out."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.quantize.preflight import Fallback, Preflight, check_room, preflight, substitutes
    from bitladder.quantize.prepare import DROPPED, TUNE_KEY, VERSION_KEY, PreparedQuant, prepare
    from bitladder.quantize.quantize_options import (
        AS_PRESET,
        LADDERS,
        RUNGS,
        QuantizeOptions,
        parse_layers,
        preset_names,
        unreached_option,
    )
    from bitladder.quantize.write_quant import QUANTIZE, QuantizeResult, quantize, write

__all__ = [
    "AS_PRESET",
    "DROPPED",
    "LADDERS",
    "QUANTIZE",
    "RUNGS",
    "TUNE_KEY",
    "VERSION_KEY",
    "Fallback",
    "Preflight",
    "PreparedQuant",
    "QuantizeOptions",
    "QuantizeResult",
    "check_room",
    "parse_layers",
    "preflight",
    "prepare",
    "preset_names",
    "quantize",
    "substitutes",
    "unreached_option",
    "write",
]
open_door(__name__)
