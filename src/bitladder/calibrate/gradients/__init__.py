"""What an error at each token, and in each output, costs in the end: gradients through the model (extra: torch).

torch is imported when the first function is called, and not by importing this package.
"""

from bitladder.calibrate.gradients.fisher import FisherCost, fisher_costs
from bitladder.calibrate.gradients.kept_moments import collect_gradient_moments, why_not
from bitladder.calibrate.gradients.usable import Agreement, check
from bitladder.calibrate.gradients.weighted_moments import GradientMoments, weighted_moments

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
