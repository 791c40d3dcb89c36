"""One item per group, least objective, under limits: exact, and fast because HiGHS sees a small part of it.

The linear relaxation says of every item how far above its bound a choice with that item must be: its reduced cost.
HiGHS solves the core, the items with small reduced costs. If what it finds is as near to the bound as the core is
wide, no item outside can be part of anything better; if not, the core is widened to that and solved again. So nothing
is lost: the answer is that of the whole problem.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bitladder.errors import BitladderError
from bitladder.plan.allocate.choices import Choices, Floats, Index, Values
from bitladder.plan.allocate.highs import Found, minimise
from bitladder.plan.allocate.limits import Limit, total
from bitladder.plan.allocate.relax import relaxed
from bitladder.plan.allocate.scale import scaled


@dataclasses.dataclass(frozen=True)
class Solution:
    """`chosen`: one item per group. No choice has an objective below `bound`.

    `prices` [limits]: what one unit more of each limit would lower the objective by, in the linear relaxation.
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
    """The choice of least objective that keeps all limits and uses at most `max_types` kinds; None if there is none.

    The search stops when the objective is proved to be within the fraction `gap` of the best. Raises BitladderError if
    HiGHS comes to its limit of nodes without any solution.
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
    # About two items per group: a guess that is mostly wide enough.
    width = float(ranked[min(len(items) - 1, 2 * len(choices.groups) + 64)])
    while True:
        core = items[reduced <= width]
        found = _search(choices, objective, limits, core, max_types, gap * abs(relaxation.bound), best)
        if found.chosen is not None and total(objective, found.chosen) < value:
            best, value = found.chosen, total(objective, found.chosen)
        if len(core) == len(items) or value <= relaxation.bound + width:
            break
        # In steps, because on the way to what the best solution so far asks for there are better ones.
        width = min(value - relaxation.bound, float(ranked[min(len(items) - 1, len(core) * 3 // 2)]))
    if best is None:
        if found.infeasible:
            return None
        raise BitladderError("the solver found no allocation within its limit of nodes; relax a limit, or max_types")
    bound = found.bound if len(core) == len(items) else min(found.bound, relaxation.bound + width)
    return Solution(best, min(max(bound, relaxation.bound), value), relaxation.prices)


def _search(
    choices: Choices,
    objective: Values,
    limits: Sequence[Limit],
    items: Index,
    max_types: int | None,
    gap: float,
    known: Index | None,
) -> Found:
    """The integer program over these items, in our units. What HiGHS returns is checked with exact sums.

    HiGHS takes 0.999999 for 1, so that a choice may break a limit by a millionth. Then no choice that has at least the
    same value in every group can keep the limit either: HiGHS is told so, in a row of ones and zeros, and asked again.
    """
    complete = len(np.unique(choices.group[items])) == len(choices.groups)
    start = scaled(choices, objective, limits, items, max_types) if complete else None
    if start is None:
        return Found(None, math.inf, infeasible=True)
    model, groups = start.model, len(choices.groups)
    while True:
        found = minimise(model, gap / start.objective_unit, None if known is None else np.searchsorted(items, known))
        bound = found.bound * start.objective_unit + start.offset
        if found.chosen is None:
            return Found(None, bound, found.infeasible)
        chosen = items[found.chosen]
        broken = [limit.values for limit in limits if not limit.holds(chosen)]
        if not broken:
            return Found(chosen, bound, infeasible=False)
        covers = [(values[items] >= values[chosen][model.group]).astype(np.float64) for values in broken]
        model = dataclasses.replace(
            model,
            limits=np.concatenate([model.limits, covers]),
            most=np.concatenate([model.most, np.full(len(covers), groups - 1.0)]),
        )
