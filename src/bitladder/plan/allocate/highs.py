"""The door to HiGHS: a multiple-choice knapsack as a linear and as an integer program.

Variables are x[item] and, where the number of kinds is limited, y[kind], all between 0 and 1. Rows: the items of a
group sum to 1; limits · x ≤ most; Σ y ≤ max_kinds; x[item] ≤ y[kind of the item].
"""

import dataclasses

import highspy
import numpy as np
from highspy._core import _Highs

from bitladder.plan.allocate.choices import Floats, Index

# Nodes of the search tree, and not seconds, so that every machine stops at the same place.
MAX_NODES = 20_000


@dataclasses.dataclass(frozen=True)
class Model:
    """group: ascending, every number occurs. objective [items], limits [limits, items], most [limits]: scaled.

    kind [items]; max_kinds: None for no limit.
    """

    group: Index
    kind: Index
    objective: Floats
    limits: Floats
    most: Floats
    max_kinds: int | None


@dataclasses.dataclass(frozen=True)
class Duals:
    """What one unit more of each right side would lower the objective by; all ≥ 0.

    limits [limits]; links [items]: of x ≤ y (zeros where the number of kinds is not limited).
    """

    limits: Floats
    links: Floats


@dataclasses.dataclass(frozen=True)
class Found:
    """What the integer program gave: one item per group or None, and a bound that holds for every solution.

    `infeasible`: there is proved to be no solution.
    """

    chosen: Index | None
    bound: float
    infeasible: bool


def relax(model: Model) -> Duals | None:
    """Solve the linear relaxation; None if even that has no solution."""
    solver = _solver(model, integral=False)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    rows = np.maximum(0.0, -np.array(solver.getSolution().row_dual))
    groups, limits, items = int(model.group[-1]) + 1, len(model.most), len(model.group)
    duals = rows[groups : groups + limits]
    links = np.zeros(items) if model.max_kinds is None else rows[groups + limits + 1 :]
    return Duals(duals, links)


def minimise(model: Model, gap: float, start: Index | None = None) -> Found:
    """Solve the integer program until the objective is proved to be within `gap` of the best.

    `start`: items, one per group, of a solution that is known.
    """
    solver = _solver(model, integral=True)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", gap)
    solver.setOptionValue("mip_max_nodes", MAX_NODES)
    if start is not None:
        items = len(model.group)
        x = np.isin(np.arange(items), start)
        y = np.isin(np.arange(solver.getNumCol() - items), model.kind[start])
        solution = highspy.HighsSolution()
        solution.col_value = [*x.astype(float), *y.astype(float)]
        solver.setSolution(solution)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        infeasible = solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        return Found(None, info.mip_dual_bound, infeasible)
    x = np.array(solver.getSolution().col_value[: len(model.group)])
    return Found(np.flatnonzero(x > 0.5), info.mip_dual_bound, infeasible=False)


def _solver(model: Model, *, integral: bool) -> _Highs:
    # The class Highs around this one writes a banner to stdout before it can be told not to (1.16).
    solver = _Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("parallel", "off")
    solver.setOptionValue("random_seed", 0)
    if solver.passModel(_program(model, integral=integral)) == highspy.HighsStatus.kError:
        raise RuntimeError("HiGHS refuses the model")
    return solver


def _program(model: Model, *, integral: bool) -> highspy.HighsLp:
    items, groups = len(model.group), int(model.group[-1]) + 1
    every = np.arange(items)
    # Rows as (columns, values, lengths of the rows): all groups together are one pass over the items.
    blocks = [(every, np.ones(items), np.bincount(model.group, minlength=groups))]
    blocks += [(every, limit, np.array([items])) for limit in model.limits]
    upper = [np.ones(groups), model.most]
    kinds = 0
    if model.max_kinds is not None:
        kinds = int(model.kind.max()) + 1
        links = np.column_stack([every, items + model.kind]).ravel()
        blocks.append((items + np.arange(kinds), np.ones(kinds), np.array([kinds])))
        blocks.append((links, np.tile([1.0, -1.0], items), np.full(items, 2)))
        upper += [np.array([float(model.max_kinds)]), np.zeros(items)]
    right = np.concatenate(upper)
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = items + kinds, len(right)
    program.col_cost_ = np.concatenate([model.objective, np.zeros(kinds)])
    program.col_lower_, program.col_upper_ = np.zeros(items + kinds), np.ones(items + kinds)
    program.row_lower_ = np.concatenate([np.ones(groups), np.full(len(right) - groups, -highspy.kHighsInf)])
    program.row_upper_ = right
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.concatenate([b[2] for b in blocks]))]).astype(np.int32)
    program.a_matrix_.index_ = np.concatenate([b[0] for b in blocks]).astype(np.int32)
    program.a_matrix_.value_ = np.concatenate([b[1] for b in blocks])
    if integral:
        program.integrality_ = [highspy.HighsVarType.kInteger] * (items + kinds)
    return program
