"""Which integers a tensor's blocks hold: chosen for the output of the layer, not for each weight by itself."""

from bitladder.rounding.method import METHODS, Method, Rounded, RoundingOptions, can_round, round_tensor

__all__ = ["METHODS", "Method", "Rounded", "RoundingOptions", "can_round", "round_tensor"]
