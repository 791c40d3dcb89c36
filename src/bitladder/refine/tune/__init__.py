"""The F16 numbers of a quant's blocks tuned for the predictions of the whole model (extra: torch)."""

from bitladder.refine.tune.tune_quant import TUNING, TunedQuant, tune, tune_in_place

__all__ = ["TUNING", "TunedQuant", "tune", "tune_in_place"]
