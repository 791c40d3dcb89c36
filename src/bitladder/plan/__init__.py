"""From prices to a recipe: a target, an exact allocation, and measured feedback."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.plan.feedback import PLANNING, FeedbackResult, TriedRecipe
    from bitladder.plan.options import (
        Constraints,
        FeedbackOptions,
        PlanDecoding,
        PlanOptions,
        PriceOptions,
        RivalOptions,
        TargetOptions,
    )
    from bitladder.plan.planner import RENDERED, PlanInputs, Planner, planning_text
    from bitladder.plan.prices.menu import TypePrices, Window, load_prices
    from bitladder.plan.prices.price import FISHER_PRICES, PRICES
    from bitladder.plan.result import MovedTensors, PlanResult, Share, moved_tensors, planned_recipe, shares
    from bitladder.plan.rungs import BANDS, RungMode, band_name, band_of, candidates, plan_rung, price_band
    from bitladder.plan.subject import Preset, Subject
    from bitladder.plan.target import MEMORY, Target, check_target, memory_beside_weights, target_of

__all__ = [
    "BANDS",
    "FISHER_PRICES",
    "MEMORY",
    "PLANNING",
    "PRICES",
    "RENDERED",
    "Constraints",
    "FeedbackOptions",
    "FeedbackResult",
    "MovedTensors",
    "PlanDecoding",
    "PlanInputs",
    "PlanOptions",
    "PlanResult",
    "Planner",
    "Preset",
    "PriceOptions",
    "RivalOptions",
    "RungMode",
    "Share",
    "Subject",
    "Target",
    "TargetOptions",
    "TriedRecipe",
    "TypePrices",
    "Window",
    "band_name",
    "band_of",
    "candidates",
    "check_target",
    "load_prices",
    "memory_beside_weights",
    "moved_tensors",
    "plan_rung",
    "planned_recipe",
    "planning_text",
    "price_band",
    "shares",
    "target_of",
]
open_door(__name__)
