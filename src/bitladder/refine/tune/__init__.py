"""Tuning what is free in a quant, the F16 numbers of its blocks and its norms, for the whole model's predictions."""

from bitladder.refine.tune.tune_quant import Tuned, TuneOptions, tune

__all__ = ["TuneOptions", "Tuned", "tune"]
