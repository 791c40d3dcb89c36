"""Second moments of the inputs of weights: their sums, the file that keeps them, and what tokens count by position."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.calibrate.moments.moments_file import Moment, MomentsFile, MomentShape, Provenance, writing_moments
    from bitladder.calibrate.moments.positions import POSITIONS, PositionOptions, position_weights

__all__ = [
    "POSITIONS",
    "Moment",
    "MomentShape",
    "MomentsFile",
    "PositionOptions",
    "Provenance",
    "position_weights",
    "writing_moments",
]
open_door(__name__)
