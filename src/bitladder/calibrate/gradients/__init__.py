"""What an error at each token, and in each output, costs in the end: gradients through the model (extra: torch).

torch is imported when the first function is called, and not by importing this package.
"""

from bitladder.calibrate.gradients.fisher import FISHER, FisherCost, FisherOptions, fisher_costs
from bitladder.calibrate.gradients.options import GradientOptions
from bitladder.calibrate.gradients.usable import (
    CHECKED_TOKENS,
    LogitAgreement,
    check_logits,
    require_torch,
    torch_threads,
    why_no_gradients,
)
from bitladder.calibrate.gradients.weighted_moments import (
    GRADIENT_MOMENTS,
    GradientMoments,
    weighted_moments,
)

__all__ = [
    "CHECKED_TOKENS",
    "FISHER",
    "GRADIENT_MOMENTS",
    "FisherCost",
    "FisherOptions",
    "GradientMoments",
    "GradientOptions",
    "LogitAgreement",
    "check_logits",
    "fisher_costs",
    "require_torch",
    "torch_threads",
    "weighted_moments",
    "why_no_gradients",
]
