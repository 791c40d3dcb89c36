"""The linear relaxation: a bound, a price for each limit, and how far each item is from being of use."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bitladder.plan.allocate.choices import Choices, Floats, Index, Values
from bitladder.plan.allocate.highs import relax
from bitladder.plan.allocate.limits import Limit
from bitladder.plan.allocate.scale import least, scaled


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """No choice has an objective below `bound`, and none with items[i] has one below bound + reduced[i].

    `items` are those that may be in a best choice. `prices` [limits]: what one unit more of each limit would lower
    the bound by.
    """

    items: Index
    bound: float
    reduced: Floats
    prices: Floats


def relaxed(choices: Choices, objective: Values, limits: Sequence[Limit], max_types: int | None) -> Relaxation | None:
    """The Lagrangian bound at the linear relaxation's duals; None if the relaxation has no solution.

    HiGHS only proposes the duals. The bound holds for any duals, so its tolerances do not weaken the proof.
    """
    items = _useful(choices, objective, limits, prune=max_types is None)
    model = None if items is None else scaled(choices, objective, limits, items, max_types)
    duals = None if model is None else relax(model.model)
    if items is None or model is None or duals is None:
        return None
    group, kind = choices.group[items], choices.kind[items]
    prices = duals.limits * model.objective_unit / model.limit_units
    links = duals.links * model.objective_unit
    values = objective[items] + links
    for price, limit in zip(prices, limits, strict=True):
        values = values + price * limit.values[items]
    lowest = least(values, group)
    bound = math.fsum(lowest) - math.fsum(p * limit.slackened for p, limit in zip(prices, limits, strict=True))
    reduced = values - lowest[group]
    if max_types is not None:
        # A kind in use gains what its links are worth. At best those worth most are used, and another one in their
        # place loses the difference.
        worth = np.bincount(kind, links)
        top = np.sort(worth)[::-1][:max_types]
        bound -= math.fsum(top)
        reduced = reduced + np.maximum(0.0, top[-1] - worth)[kind]
    return Relaxation(items, bound, reduced, prices)


def _useful(choices: Choices, objective: Values, limits: Sequence[Limit], *, prune: bool) -> Index | None:
    """Items that fit beside the least of all other groups and that no other item of their group dominates.

    None if a group has none. Under a limit on kinds no item is dominated: the better one may be of one kind too many.
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
    """Columns that no other column is at most equal to in every row; of equal columns the first."""
    as_good = (table[:, :, None] <= table[:, None, :]).all(axis=0)  # [a, b]: a is as good as b, or better, everywhere
    equal = as_good & as_good.T
    return np.flatnonzero(~((as_good & ~equal) | np.triu(equal, k=1)).any(axis=0))
