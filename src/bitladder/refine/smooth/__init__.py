"""Scales moved between weights, and channels put in order, so that blocks lose less while the model stays the same."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.refine.smooth.balance import balance
    from bitladder.refine.smooth.changes import smoothed_moments
    from bitladder.refine.smooth.links import Link, SmoothingError, links_of
    from bitladder.refine.smooth.order import order_for_blocks
    from bitladder.refine.smooth.smoothed_model import KEY, SMOOTHING, SmoothResult, smooth_model
    from bitladder.refine.smooth.smoothing_trial import SMOOTHING_TRIAL, SmoothingTrial, trial_text, try_smoothing

__all__ = [
    "KEY",
    "SMOOTHING",
    "SMOOTHING_TRIAL",
    "Link",
    "SmoothResult",
    "SmoothingError",
    "SmoothingTrial",
    "balance",
    "links_of",
    "order_for_blocks",
    "smooth_model",
    "smoothed_moments",
    "trial_text",
    "try_smoothing",
]
open_door(__name__)
