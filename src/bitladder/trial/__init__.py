"""What a change to a model costs: tensors rendered in other types, swapped into a loaded model, and measured there."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.trial.copies import Helpers, ModelPair, Pair, copies, rendering_shares
    from bitladder.trial.journal import Journal, MeasuredRecipe, Measurements, Measures, Wanted, recipe_key
    from bitladder.trial.render import KEPT_SHARE, RENDERING, Renderer, render_all
    from bitladder.trial.rounding_method import RoundingMethod, StockRounding
    from bitladder.trial.swapped_model import (
        SWAPPED_KLD,
        BlockLoss,
        PruneOptions,
        Rendered,
        SwappedModel,
        blocks_left_out,
        kept_base,
        measurement_inputs,
        rank_blocks,
    )

__all__ = [
    "KEPT_SHARE",
    "RENDERING",
    "SWAPPED_KLD",
    "BlockLoss",
    "Helpers",
    "Journal",
    "MeasuredRecipe",
    "Measurements",
    "Measures",
    "ModelPair",
    "Pair",
    "PruneOptions",
    "Rendered",
    "Renderer",
    "RoundingMethod",
    "StockRounding",
    "SwappedModel",
    "Wanted",
    "blocks_left_out",
    "copies",
    "kept_base",
    "measurement_inputs",
    "rank_blocks",
    "recipe_key",
    "render_all",
    "rendering_shares",
]
open_door(__name__)
