"""A whole model rounded for the outputs of its layers: rendered, tried on held-out text, written."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.refine.round.guard import GUARD, Guard, GuardReport, GuardTrial, guard_json
    from bitladder.refine.round.output_rounding import OUTPUT_ROUNDING, OutputRounding, refuse_other_moments
    from bitladder.refine.round.quantize_rounded import ROUNDED_QUANT, RoundedQuant, guard_text, quantize_rounded

__all__ = [
    "GUARD",
    "OUTPUT_ROUNDING",
    "ROUNDED_QUANT",
    "Guard",
    "GuardReport",
    "GuardTrial",
    "OutputRounding",
    "RoundedQuant",
    "guard_json",
    "guard_text",
    "quantize_rounded",
    "refuse_other_moments",
]
open_door(__name__)
