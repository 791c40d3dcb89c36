"""One quant: a GGUF and a type for each tensor in, a GGUF out."""

from bitladder.engine.presets import presets
from bitladder.quantize.preflight import Fallback, Preflight, check_room, preflight
from bitladder.quantize.prepare import PreparedQuant, prepare
from bitladder.quantize.quant_metadata import DROPPED, TUNE_KEY, VERSION_KEY
from bitladder.quantize.quantize_options import QuantizeOptions, parse_layers
from bitladder.quantize.write_quant import QUANTIZE, QuantizeResult, quantize, write

# The ladder, from the smallest to the largest.
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


def preset_names() -> list[str]:
    """The names of all presets of the library."""
    return sorted(presets())


__all__ = [
    "DROPPED",
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
    "write",
]
