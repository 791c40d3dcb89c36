"""Which type each tensor gets: least predicted loss for a size, or least size for a predicted loss, exactly."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.plan.allocate.allocation import ALLOCATION, greedy, smallest_bytes, smallest_cost
    from bitladder.plan.allocate.neighbours import Exchange, neighbours
    from bitladder.plan.allocate.problem import Allocation, Problem, TypeOption

__all__ = [
    "ALLOCATION",
    "Allocation",
    "Exchange",
    "Problem",
    "TypeOption",
    "greedy",
    "neighbours",
    "smallest_bytes",
    "smallest_cost",
]
open_door(__name__)
