"""Which type each tensor gets: least predicted loss for a size, or least size for a predicted loss, exactly."""

from bitladder.plan.allocate.exact import frontier, smallest_bytes, smallest_cost
from bitladder.plan.allocate.greedy import greedy
from bitladder.plan.allocate.neighbours import Exchange, neighbours
from bitladder.plan.allocate.problem import Allocation, Cap, Option, Problem

__all__ = [
    "Allocation",
    "Cap",
    "Exchange",
    "Option",
    "Problem",
    "frontier",
    "greedy",
    "neighbours",
    "smallest_bytes",
    "smallest_cost",
]
