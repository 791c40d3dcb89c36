"""Scales moved between weights so that blocks lose less, while the model computes the same."""

from bitladder.smooth.links import Link, SmoothingError, links_of
from bitladder.smooth.model import KEY, SmoothResult, smooth_model
from bitladder.smooth.moments import smoothed_moments
from bitladder.smooth.order import order_for_blocks
from bitladder.smooth.scales import balance
from bitladder.smooth.trial import Trial, trial

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
