"""Tuning the F16 numbers of a quant's blocks for the whole model's predictions."""

from bitladder.refine.tune.tune_quant import Tuned, TuneOptions, tune

__all__ = ["TuneOptions", "Tuned", "tune"]
