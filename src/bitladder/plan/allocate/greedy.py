"""The usual heuristic, to compare with: spend bytes where the next step saves most per byte."""

from collections.abc import Sequence

import numpy as np

from bitladder.plan.allocate.choices import Choices, Index, choices_of
from bitladder.plan.allocate.exact import allocation_of
from bitladder.plan.allocate.infeasible import no_allocation, no_size
from bitladder.plan.allocate.limits import Limit, side_limits, size_limits
from bitladder.plan.allocate.problem import Allocation, Problem
from bitladder.plan.allocate.relax import relaxed
from bitladder.plan.allocate.solve import solve


def greedy(problem: Problem, max_bytes: int) -> Allocation:
    """Start from the smallest file; as long as something fits, change the tensor that saves most cost per added byte.

    A step may skip types. It must keep all limits, and never adds a type beyond `max_types`. The bound is that of the
    linear relaxation. Raises what `smallest_cost` raises.
    """
    choices = choices_of(problem)
    start = solve(choices, choices.nbytes, side_limits(problem, choices), problem.max_types)
    if start is None:
        raise no_allocation(problem, choices)
    limits = size_limits(problem, choices, max_bytes)
    if not all(limit.holds(start.chosen) for limit in limits):
        raise no_size(problem, choices, max_bytes)
    chosen = start.chosen.copy()
    while (step := _best_step(choices, chosen, limits, problem.max_types)) is not None:
        chosen[choices.group[step]] = step
    # Without the limit on types the bound is lower, and still a bound.
    relaxation = relaxed(choices, choices.cost, limits, None)
    if relaxation is None:
        raise no_size(problem, choices, max_bytes)
    return allocation_of(problem, choices, chosen, "cost", relaxation.bound, float(relaxation.prices[0]))


def _best_step(choices: Choices, chosen: Index, limits: Sequence[Limit], max_types: int | None) -> int | None:
    """The item that saves most cost per byte in place of its group's chosen one; None if nothing saves and fits."""
    saved = choices.cost[chosen][choices.group] - choices.cost
    better = saved > 0
    for limit in limits:
        better &= limit.values - limit.values[chosen][choices.group] <= limit.room(limit.values[chosen])
    used = np.bincount(choices.kind[chosen], minlength=len(choices.kinds)) > 0
    if max_types is not None and np.count_nonzero(used) >= max_types:
        better &= used[choices.kind]
    if not better.any():
        return None
    added = choices.nbytes - choices.nbytes[chosen][choices.group]
    # What saves cost without adding a byte comes first.
    rate = np.where(added > 0, saved / np.maximum(added, 1), np.inf)
    return int(np.argmax(np.where(better, rate, -np.inf)))
