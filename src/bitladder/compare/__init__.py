"""Compares GGUFs of one model: what each is made of, whether it is of that model, and which is best."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.compare.comparison import (
        ComparedModel,
        CompareOptions,
        QuantComparison,
        compare_quants,
        defeats,
        gaps_on_texts,
        perplexity_sign,
        size_groups,
    )
    from bitladder.compare.same_model import OriginFinding, check_structure, check_weights, gravest

__all__ = [
    "CompareOptions",
    "ComparedModel",
    "OriginFinding",
    "QuantComparison",
    "check_structure",
    "check_weights",
    "compare_quants",
    "defeats",
    "gaps_on_texts",
    "gravest",
    "perplexity_sign",
    "size_groups",
]
open_door(__name__)
