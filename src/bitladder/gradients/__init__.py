"""What an error at each token, and in each output, costs in the end: gradients through the model (extra: torch).

torch is imported when the first function is called, and not by importing this package.
"""

from bitladder.gradients.check import Agreement, check
from bitladder.gradients.collect import collect_gradient_moments, why_not
from bitladder.gradients.fisher import FisherCost, fisher_costs
from bitladder.gradients.moments import GradientMoments, weighted_moments

__all__ = [
    "Agreement",
    "FisherCost",
    "GradientMoments",
    "check",
    "collect_gradient_moments",
    "fisher_costs",
    "weighted_moments",
    "why_not",
]
