"""Scales moved between weights so that blocks lose less, while the model computes the same."""

from bitladder.refine.smooth.links import Link, SmoothingError, links_of
from bitladder.refine.smooth.moments import smoothed_moments
from bitladder.refine.smooth.order import order_for_blocks
from bitladder.refine.smooth.scales import balance
from bitladder.refine.smooth.smooth_model import KEY, SmoothResult, smooth_model
from bitladder.refine.smooth.smoothing_trial import Trial, trial

__all__ = [
    "KEY",
    "Link",
    "SmoothResult",
    "SmoothingError",
    "Trial",
    "balance",
    "links_of",
    "order_for_blocks",
    "smooth_model",
    "smoothed_moments",
    "trial",
]
