"""One item per group, least objective, under limits: exact, and fast because HiGHS solves a small part of it.

The linear relaxation gives a bound, a price of each limit, and the reduced cost of every item: a choice with that item
is at least so much above the bound. HiGHS solves the core: the items with small reduced costs. If its solution is as
near to the bound as the core is wide, no item outside the core can be part of a better one. Otherwise the core is
widened to that distance and solved again. The result is the optimum of the whole problem.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bitladder.errors import BitladderError
from bitladder.plan.allocate.highs import IntegerSolution, least, minimise, relax, scaled
from bitladder.plan.allocate.problem import Choices, Floats, Index, Limit, Values, total


@dataclasses.dataclass(frozen=True)
class Solution:
    """The optimum.

    Parameters:
        chosen: one item per group.
        bound: no choice has a smaller objective.
        prices: by how much one unit more of each limit lowers the objective in the linear relaxation, shape [limits].
    """

    chosen: Index
    bound: float
    prices: Floats


def solve(
    choices: Choices,
    objective: Values,
    limits: Sequence[Limit],
    max_types: int | None = None,
    gap: float = 0.0,
) -> Solution | None:
    """The choice of least objective under all limits.

    Parameters:
        choices: groups and items.
        objective: value of each item, shape [items].
        limits: limits on sums over the chosen items.
        max_types: how many types may be used; None for no limit.
        gap: the search stops when the objective is proved to be within this fraction of the optimum.

    Returns:
        The solution; None if no choice keeps all limits.

    Raises:
        BitladderError: HiGHS comes to its limit of nodes without any solution.
    """
    if max_types is not None and max_types >= len(choices.kinds):
        max_types = None
    relaxation = relaxed(choices, objective, limits, max_types)
    if relaxation is None:
        return None
    items, reduced = relaxation.items, relaxation.reduced
    best: Index | None = None
    value = math.inf
    ranked = np.sort(reduced)
    # About two items per group are mostly enough.
    width = float(ranked[min(len(items) - 1, 2 * len(choices.groups) + 64)])
    while True:
        core = items[reduced <= width]
        part = _Core(choices, objective, limits, core, max_types)
        searched = part.search(gap * abs(relaxation.bound), best)
        if searched.chosen is not None and total(objective, searched.chosen) < value:
            best, value = searched.chosen, total(objective, searched.chosen)
        if len(core) == len(items) or value <= relaxation.bound + width:
            break
        # The width grows in steps: a better solution may turn up before the width that the present one needs.
        width = min(value - relaxation.bound, float(ranked[min(len(items) - 1, len(core) * 3 // 2)]))
    if best is None:
        if searched.infeasible:
            return None
        raise BitladderError("the solver found no allocation within its limit of nodes; relax a limit, or max_types")
    bound = searched.bound if len(core) == len(items) else min(searched.bound, relaxation.bound + width)
    return Solution(best, min(max(bound, relaxation.bound), value), relaxation.prices)


@dataclasses.dataclass(frozen=True)
class _Core:
    """A part of the items, and what is to be solved with them."""

    choices: Choices
    objective: Values
    limits: Sequence[Limit]
    items: Index
    max_types: int | None

    def search(self, gap: float, known: Index | None) -> IntegerSolution:
        """Solves the integer program, in our units. The solver's result is checked with exact sums.

        HiGHS takes 0.999999 for 1, so that a choice may break a limit by a millionth. Then no choice that has at least
        the same value in every group keeps the limit either. A row of ones and zeros tells HiGHS so, and it is run
        again.
        """
        choices, items = self.choices, self.items
        groups = len(choices.groups)
        complete = len(np.unique(choices.group[items])) == groups
        start = scaled(choices, self.objective, self.limits, items, self.max_types) if complete else None
        if start is None:
            return IntegerSolution(None, math.inf, infeasible=True)
        program = start.program
        places = None if known is None else np.searchsorted(items, known)
        while True:
            solution = minimise(program, gap / start.objective_unit, places)
            bound = solution.bound * start.objective_unit + start.offset
            if solution.chosen is None:
                return IntegerSolution(None, bound, solution.infeasible)
            chosen = items[solution.chosen]
            broken = [limit.values for limit in self.limits if not limit.holds(chosen)]
            if not broken:
                return IntegerSolution(chosen, bound, infeasible=False)
            covers = [(values[items] >= values[chosen][program.group]).astype(np.float64) for values in broken]
            program = dataclasses.replace(
                program,
                limits=np.concatenate([program.limits, covers]),
                most=np.concatenate([program.most, np.full(len(covers), groups - 1.0)]),
            )


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The linear relaxation.

    Parameters:
        items: the items that may be in a best choice.
        bound: no choice has a smaller objective.
        reduced: no choice with items[i] has an objective below bound + reduced[i]. Shape [items].
        prices: by how much one unit more of each limit lowers the bound, shape [limits].
    """

    items: Index
    bound: float
    reduced: Floats
    prices: Floats


def relaxed(choices: Choices, objective: Values, limits: Sequence[Limit], max_types: int | None) -> Relaxation | None:
    """The Lagrangian bound at the linear relaxation's duals; None if the relaxation has no solution.

    HiGHS only proposes the duals. The bound holds for any duals, so that the solver's tolerances do not weaken the
    proof.
    """
    items = _useful(choices, objective, limits, prune=max_types is None)
    start = None if items is None else scaled(choices, objective, limits, items, max_types)
    duals = None if start is None else relax(start.program)
    if items is None or start is None or duals is None:
        return None
    group, kind = choices.group[items], choices.kind[items]
    prices = duals.limits * start.objective_unit / start.limit_units
    links = duals.links * start.objective_unit
    values = objective[items] + links
    for price, limit in zip(prices, limits, strict=True):
        values = values + price * limit.values[items]
    lowest = least(values, group)
    bound = math.fsum(lowest) - math.fsum(p * limit.slackened for p, limit in zip(prices, limits, strict=True))
    reduced = values - lowest[group]
    if max_types is not None:
        # A type in use gains the worth of its links. At best the types of most worth are used. Another type in their
        # place loses the difference.
        worth = np.bincount(kind, links)
        top = np.sort(worth)[::-1][:max_types]
        bound -= math.fsum(top)
        reduced = reduced + np.maximum(0.0, top[-1] - worth)[kind]
    return Relaxation(items, bound, reduced, prices)


def _useful(choices: Choices, objective: Values, limits: Sequence[Limit], *, prune: bool) -> Index | None:
    """Items that fit beside the smallest of all other groups and that no other item of their group dominates.

    None if a group has no such item. Under a limit on types no item is dominated: the better one may be of a type too
    many.
    """
    fits = np.ones(len(choices.group), bool)
    for limit in limits:
        lowest = least(limit.values, choices.group)
        fits &= limit.values - lowest[choices.group] <= limit.room(lowest)
    items = np.flatnonzero(fits)
    if len(np.unique(choices.group[items])) < len(choices.groups):
        return None
    if not prune:
        return items
    table = np.array([objective, *(limit.values for limit in limits)], np.float64)
    members = np.split(items, np.flatnonzero(np.diff(choices.group[items])) + 1)
    return np.concatenate([member[_undominated(table[:, member])] for member in members])


def _undominated(table: Floats) -> Index:
    """The columns that no other column equals or undercuts in every row; of equal columns the first.

    Example:
        >>> _undominated(np.array([[1.0, 2.0, 1.0], [3.0, 1.0, 4.0]])).tolist()
        [0, 1]
    """
    as_good = (table[:, :, None] <= table[:, None, :]).all(axis=0)  # [a, b]: a is at least as good as b everywhere
    equal = as_good & as_good.T
    return np.flatnonzero(~((as_good & ~equal) | np.triu(equal, k=1)).any(axis=0))
