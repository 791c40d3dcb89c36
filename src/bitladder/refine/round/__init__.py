"""A whole model rounded for its layers' outputs: rendered, proved on held-out text, written."""

from bitladder.refine.round.guard import Guard, GuardReport, Trial
from bitladder.refine.round.quantize_rounded import Refined, RefineOptions, quantize_refined
from bitladder.refine.sequential import Sequential

__all__ = ["Guard", "GuardReport", "RefineOptions", "Refined", "Sequential", "Trial", "quantize_refined"]
