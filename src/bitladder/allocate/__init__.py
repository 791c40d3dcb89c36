"""Which type each tensor gets: least predicted loss for a size, or least size for a predicted loss, exactly."""

from bitladder.allocate.exact import frontier, smallest_bytes, smallest_cost
from bitladder.allocate.greedy import greedy
from bitladder.allocate.neighbours import Exchange, neighbours
from bitladder.allocate.problem import Allocation, Cap, Option, Problem
from bitladder.allocate.sizes import bpw_bytes, parse_size, size_text

__all__ = [
    "Allocation",
    "Cap",
    "Exchange",
    "Option",
    "Problem",
    "bpw_bytes",
    "frontier",
    "greedy",
    "neighbours",
    "parse_size",
    "size_text",
    "smallest_bytes",
    "smallest_cost",
]
