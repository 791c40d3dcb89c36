"""Measuring a model file: perplexity, and divergence from the full-precision model."""

from bitladder.evaluate.base import HiddenBase
from bitladder.evaluate.cache import cache_path, load_or_compute_base, open_base
from bitladder.evaluate.divergence import TokenScores
from bitladder.evaluate.identity import Identity, identify
from bitladder.evaluate.measure import base_scores, evaluate, make_base, measure, open_or_compute
from bitladder.evaluate.scores import Figure, Scores
from bitladder.evaluate.settings import Settings

__all__ = [
    "Figure",
    "HiddenBase",
    "Identity",
    "Scores",
    "Settings",
    "TokenScores",
    "base_scores",
    "cache_path",
    "evaluate",
    "identify",
    "load_or_compute_base",
    "make_base",
    "measure",
    "open_base",
    "open_or_compute",
]
