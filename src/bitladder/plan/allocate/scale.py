"""A part of the choices in HiGHS's units."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bitladder.plan.allocate.choices import Choices, Floats, Index, Values
from bitladder.plan.allocate.highs import Model
from bitladder.plan.allocate.limits import Limit

# Limits and objectives get ranges of this size: the solver's tolerances, 1e-6 and 1e-7, are absolute.
RANGE = 1e5


@dataclasses.dataclass(frozen=True)
class Scaled:
    """objective = offset + objective_unit · the model's objective; a limit of the model is ours over limit_units."""

    model: Model
    offset: float
    objective_unit: float
    limit_units: Floats


def scaled(
    choices: Choices, objective: Values, limits: Sequence[Limit], items: Index, max_types: int | None
) -> Scaled | None:
    """The model of these items, with each group's least taken off; None if the least already breaks a limit.

    Bytes of tensors have large common divisors. In their units the numbers are small, and most often the solver's
    arithmetic on them is exact.
    """
    group = choices.group[items]
    goal = objective[items]
    offsets = least(goal, group)
    goal = goal - offsets[group]
    unit = float(goal.max()) / RANGE or 1.0
    rows = [_row(limit, items, group) for limit in limits]
    if any(right < 0 for _, right, _ in rows):
        return None
    model = Model(
        group,
        choices.kind[items],
        goal / unit,
        np.array([row for row, _, _ in rows], np.float64).reshape(len(limits), len(items)),
        np.array([right for _, right, _ in rows], np.float64),
        max_types,
    )
    return Scaled(model, math.fsum(offsets), unit, np.array([unit for _, _, unit in rows], np.float64))


def least(values: Values, group: Index) -> Values:
    """The least value of each group; `group` is ascending and has every number."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    return np.minimum.reduceat(values, starts)


def _row(limit: Limit, items: Index, group: Index) -> tuple[Floats, float, float]:
    """Left side [items] and right side of a limit, and the unit that both were divided by."""
    values = limit.values[items]
    base = least(values, group)
    values = values - base[group]
    if limit.integral:
        step = int(np.gcd.reduce(values)) or 1
        right = limit.room(base) // step  # whole steps: what is less than one is of no use
        unit = max(1.0, right / RANGE)
        return values / (step * unit), right / unit, step * unit
    room = limit.room(base)
    unit = room / RANGE if room > 0 else 1.0
    return values / unit, room / unit, unit
