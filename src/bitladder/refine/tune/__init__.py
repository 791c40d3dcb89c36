"""The F16 numbers of a quant's blocks tuned for the predictions of the whole model (extra: torch)."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.refine.tune.tune_quant import TUNING, TunedQuant, tune, tune_in_place

__all__ = ["TUNING", "TunedQuant", "tune", "tune_in_place"]
open_door(__name__)
