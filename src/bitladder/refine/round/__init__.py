"""A whole model rounded for its layers' outputs: rendered, proved on held-out text, written."""

from bitladder.refine.round.guard import Guard, GuardOptions, GuardReport, GuardTrial
from bitladder.refine.round.quantize_rounded import Refined, RefineOptions, quantize_refined

__all__ = [
    "Guard",
    "GuardOptions",
    "GuardReport",
    "GuardTrial",
    "RefineOptions",
    "Refined",
    "quantize_refined",
]
