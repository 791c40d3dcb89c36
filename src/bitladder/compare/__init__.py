"""Any GGUFs of one model beside each other: what they are made of, whether they are of that model, which is best."""

from bitladder.compare.comparison import Compared, Comparison, compare, perplexity_sign
from bitladder.compare.findings import Finding, worst
from bitladder.compare.same_weights import check_weights
from bitladder.compare.structure import check_structure

__all__ = [
    "Compared",
    "Comparison",
    "Finding",
    "check_structure",
    "check_weights",
    "compare",
    "perplexity_sign",
    "worst",
]
