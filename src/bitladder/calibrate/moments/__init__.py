"""Second moments of the inputs of weights: their sums, the file that keeps them, and what tokens count by position."""

from bitladder.calibrate.moments.moments_file import Moment, MomentsFile, writing_moments
from bitladder.calibrate.moments.positions import POSITIONS, PositionOptions, position_weights
from bitladder.calibrate.moments.schema import MomentShape, Provenance

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
