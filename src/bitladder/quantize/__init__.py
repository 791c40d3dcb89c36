"""Making one quant: a GGUF and a type for each tensor in, a GGUF out."""

from bitladder.engine.presets import presets
from bitladder.quantize.preflight import Preflight, check_room, preflight
from bitladder.quantize.prepare import Prepared, prepare
from bitladder.quantize.quant_metadata import DROPPED, TUNE_KEY, VERSION_KEY
from bitladder.quantize.quantize_options import QuantizeOptions, parse_tensor_type, target_type
from bitladder.quantize.type_patterns import match_patterns
from bitladder.quantize.write_quant import QuantizeResult, quantize, refuse_target, write

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
    """Every preset the library knows."""
    return sorted(presets())


__all__ = [
    "DROPPED",
    "RUNGS",
    "TUNE_KEY",
    "VERSION_KEY",
    "Preflight",
    "Prepared",
    "QuantizeOptions",
    "QuantizeResult",
    "check_room",
    "match_patterns",
    "parse_tensor_type",
    "preflight",
    "prepare",
    "preset_names",
    "quantize",
    "refuse_target",
    "target_type",
    "write",
]
