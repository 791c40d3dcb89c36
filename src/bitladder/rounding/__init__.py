"""Which integers the blocks of a tensor hold: chosen for the output of the layer, not for each weight by itself."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.rounding.block_types import Blocks, BlockType
    from bitladder.rounding.method import (
        ROUNDING,
        TYPES,
        Rounded,
        can_round,
        fit_device,
        moments_in_memory,
        round_matrices,
        round_matrix,
        round_tensor,
        same_integers,
    )
    from bitladder.rounding.options import Method, RoundingOptions
    from bitladder.rounding.second_moments import SecondMoments

__all__ = [
    "ROUNDING",
    "TYPES",
    "BlockType",
    "Blocks",
    "Method",
    "Rounded",
    "RoundingOptions",
    "SecondMoments",
    "can_round",
    "fit_device",
    "moments_in_memory",
    "round_matrices",
    "round_matrix",
    "round_tensor",
    "same_integers",
]
open_door(__name__)
