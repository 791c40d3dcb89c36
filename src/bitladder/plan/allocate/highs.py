"""The door to HiGHS: a multiple-choice knapsack as a linear and as an integer program.

Variables are x[item] and, where the number of kinds is limited, y[kind], all between 0 and 1. Rows: the items of a
group sum to 1; limits · x ≤ most; Σ y ≤ max_kinds; x[item] ≤ y[kind of the item].
"""

import dataclasses
import math
from collections.abc import Sequence

import highspy
import numpy as np
from highspy._core import _Highs

from bitladder.plan.allocate.problem import Choices, Floats, Index, Limit, Values

# Nodes of the search tree, and not seconds, so that every machine stops at the same place.
MAX_NODES = 20_000
# Limits and objectives get ranges of this size: the solver's tolerances, 1e-6 and 1e-7, are absolute.
RANGE = 1e5


@dataclasses.dataclass(frozen=True)
class Program:
    """The knapsack in the solver's units.

    Parameters:
        group: group of each item, ascending; every number occurs. Shape [items].
        kind: type of each item, shape [items].
        objective: shape [items].
        limits: left sides of the limits, shape [limits, items].
        most: their right sides, shape [limits].
        max_kinds: how many types may be used; None for no limit.
    """

    group: Index
    kind: Index
    objective: Floats
    limits: Floats
    most: Floats
    max_kinds: int | None


@dataclasses.dataclass(frozen=True)
class Duals:
    """By how much one unit more of each right side would lower the objective; all ≥ 0.

    Parameters:
        limits: of the limits, shape [limits].
        links: of x ≤ y, shape [items]; zeros where the number of types is not limited.
    """

    limits: Floats
    links: Floats


@dataclasses.dataclass(frozen=True)
class IntegerSolution:
    """The result of an integer program.

    Parameters:
        chosen: one item per group; None if no solution was found.
        bound: no solution has a smaller objective.
        infeasible: it is proved that there is no solution.
    """

    chosen: Index | None
    bound: float
    infeasible: bool


def relax(program: Program) -> Duals | None:
    """Solves the linear relaxation. Returns None if even that has no solution."""
    solver = _solver(program, integral=False)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    rows = np.maximum(0.0, -np.array(solver.getSolution().row_dual))
    groups, limits, items = int(program.group[-1]) + 1, len(program.most), len(program.group)
    duals = rows[groups : groups + limits]
    links = np.zeros(items) if program.max_kinds is None else rows[groups + limits + 1 :]
    return Duals(duals, links)


def minimise(program: Program, gap: float, start: Index | None = None) -> IntegerSolution:
    """Solves the integer program until the objective is proved to be within `gap` of the optimum.

    `start` is a solution that is known: one item per group.
    """
    solver = _solver(program, integral=True)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", gap)
    solver.setOptionValue("mip_max_nodes", MAX_NODES)
    if start is not None:
        items = len(program.group)
        x = np.isin(np.arange(items), start)
        y = np.isin(np.arange(solver.getNumCol() - items), program.kind[start])
        solution = highspy.HighsSolution()
        solution.col_value = [*x.astype(float), *y.astype(float)]
        solver.setSolution(solution)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        infeasible = solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        return IntegerSolution(None, info.mip_dual_bound, infeasible)
    x = np.array(solver.getSolution().col_value[: len(program.group)])
    return IntegerSolution(np.flatnonzero(x > 0.5), info.mip_dual_bound, infeasible=False)


def _solver(program: Program, *, integral: bool) -> _Highs:
    # The class Highs around this one writes a banner to stdout before it can be told not to (1.16).
    solver = _Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("parallel", "off")
    solver.setOptionValue("random_seed", 0)
    if solver.passModel(_lp(program, integral=integral)) == highspy.HighsStatus.kError:
        raise RuntimeError("HiGHS refuses the model")
    return solver


def _lp(program: Program, *, integral: bool) -> highspy.HighsLp:
    items, groups = len(program.group), int(program.group[-1]) + 1
    every = np.arange(items)
    # Rows as (columns, values, lengths of the rows). All groups together are one pass over the items.
    blocks = [(every, np.ones(items), np.bincount(program.group, minlength=groups))]
    blocks += [(every, limit, np.array([items])) for limit in program.limits]
    upper = [np.ones(groups), program.most]
    kinds = 0
    if program.max_kinds is not None:
        kinds = int(program.kind.max()) + 1
        links = np.column_stack([every, items + program.kind]).ravel()
        blocks.append((items + np.arange(kinds), np.ones(kinds), np.array([kinds])))
        blocks.append((links, np.tile([1.0, -1.0], items), np.full(items, 2)))
        upper += [np.array([float(program.max_kinds)]), np.zeros(items)]
    right = np.concatenate(upper)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = items + kinds, len(right)
    lp.col_cost_ = np.concatenate([program.objective, np.zeros(kinds)])
    lp.col_lower_, lp.col_upper_ = np.zeros(items + kinds), np.ones(items + kinds)
    lp.row_lower_ = np.concatenate([np.ones(groups), np.full(len(right) - groups, -highspy.kHighsInf)])
    lp.row_upper_ = right
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.concatenate([b[2] for b in blocks]))]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([b[0] for b in blocks]).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate([b[1] for b in blocks])
    if integral:
        lp.integrality_ = [highspy.HighsVarType.kInteger] * (items + kinds)
    return lp


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A program, and how to return from its units.

    objective = offset + objective_unit · the program's objective; limit = limit_units · the program's limit.
    """

    program: Program
    offset: float
    objective_unit: float
    limit_units: Floats


def scaled(
    choices: Choices, objective: Values, limits: Sequence[Limit], items: Index, max_types: int | None
) -> Scaled | None:
    """The program of these items, less the smallest value of each group. None if the smallest values break a limit.

    Bytes of tensors have large common divisors. In units of these the numbers are small, and the solver's arithmetic
    on them is mostly exact.
    """
    group = choices.group[items]
    goal = objective[items]
    offsets = least(goal, group)
    goal = goal - offsets[group]
    unit = float(goal.max()) / RANGE or 1.0
    rows = [_row(limit, items, group) for limit in limits]
    if any(right < 0 for _, right, _ in rows):
        return None
    program = Program(
        group,
        choices.kind[items],
        goal / unit,
        np.array([row for row, _, _ in rows], np.float64).reshape(len(limits), len(items)),
        np.array([right for _, right, _ in rows], np.float64),
        max_types,
    )
    return Scaled(program, math.fsum(offsets), unit, np.array([unit for _, _, unit in rows], np.float64))


def least(values: Values, group: Index) -> Values:
    """The smallest value of each group. `group` is ascending and has every number.

    Example:
        >>> least(np.array([3, 1, 2, 5]), np.array([0, 0, 1, 1]))
        array([1, 2])
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    return np.minimum.reduceat(values, starts)


def _row(limit: Limit, items: Index, group: Index) -> tuple[Floats, float, float]:
    """Left side (shape [items]) and right side of a limit, and the unit that divided both."""
    values = limit.values[items]
    base = least(values, group)
    values = values - base[group]
    if limit.integral:
        step = int(np.gcd.reduce(values)) or 1
        right = limit.room(base) // step  # less than a whole step is of no use
        unit = max(1.0, right / RANGE)
        return values / (step * unit), right / unit, step * unit
    room = limit.room(base)
    unit = room / RANGE if room > 0 else 1.0
    return values / unit, room / unit, unit
