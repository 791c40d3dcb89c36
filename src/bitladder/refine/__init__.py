"""What makes a quant better at the same bytes: smoothing before, rounding, and tuning after; and its verification."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.refine.model_files import ModelFiles
    from bitladder.refine.options import GuardOptions, RefineOptions, SmoothingOptions, TuneOptions
    from bitladder.refine.round.guard import GUARD, GuardReport, GuardTrial, guard_json
    from bitladder.refine.round.output_rounding import OUTPUT_ROUNDING, OutputRounding, refuse_other_moments
    from bitladder.refine.round.quantize_rounded import (
        ROUNDED_QUANT,
        RoundAhead,
        RoundedQuant,
        guard_text,
        quantize_rounded,
    )
    from bitladder.refine.smooth.links import SmoothingError, links_of
    from bitladder.refine.smooth.order import ORDER_LENGTH, may_be_ordered
    from bitladder.refine.smooth.smoothed_model import (
        CHECKED_TOKENS,
        SMOOTHING,
        SMOOTHING_TRIAL,
        SmoothingTrial,
        SmoothResult,
        smooth_model,
        trial_text,
        try_smoothing,
    )
    from bitladder.refine.smooth.smoothed_model import KEY as SMOOTHED_KEY
    from bitladder.refine.tune_quant import TUNING, TunedQuant, tune, tune_in_place, tuning_texts
    from bitladder.refine.verify import VerifiedQuant, verify

__all__ = [
    "CHECKED_TOKENS",
    "GUARD",
    "ORDER_LENGTH",
    "OUTPUT_ROUNDING",
    "ROUNDED_QUANT",
    "SMOOTHED_KEY",
    "SMOOTHING",
    "SMOOTHING_TRIAL",
    "TUNING",
    "GuardOptions",
    "GuardReport",
    "GuardTrial",
    "ModelFiles",
    "OutputRounding",
    "RefineOptions",
    "RoundAhead",
    "RoundedQuant",
    "SmoothResult",
    "SmoothingError",
    "SmoothingOptions",
    "SmoothingTrial",
    "TuneOptions",
    "TunedQuant",
    "VerifiedQuant",
    "guard_json",
    "guard_text",
    "links_of",
    "may_be_ordered",
    "quantize_rounded",
    "refuse_other_moments",
    "smooth_model",
    "trial_text",
    "try_smoothing",
    "tune",
    "tune_in_place",
    "tuning_texts",
    "verify",
]
open_door(__name__)
