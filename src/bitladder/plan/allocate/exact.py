"""The best allocation for a file size, for a predicted KLD, and along a row of sizes."""

import math
from collections.abc import Iterable
from typing import Literal

from bitladder.errors import BitladderError
from bitladder.plan.allocate.choices import Choices, Index, choices_of
from bitladder.plan.allocate.infeasible import no_allocation, no_cost, no_size
from bitladder.plan.allocate.limits import Limit, side_limits, size_limits
from bitladder.plan.allocate.problem import Allocation, Problem
from bitladder.plan.allocate.solve import solve

# Far below what a prediction is worth, and mostly the optimum is proved before the search could stop at it.
GAP = 1e-6


def smallest_cost(problem: Problem, max_bytes: int | None, gap: float = GAP) -> Allocation:
    """The allocation of least predicted KLD whose file has at most `max_bytes` (None: any size).

    It is proved to be within the fraction `gap` of the best, or has its larger gap stated if the solver came to its
    limit of nodes. Raises BitladderError that names what is wrong with the problem, or, if no allocation fits, the
    smallest possible size and what keeps it from being smaller.
    """
    return _smallest_cost(problem, choices_of(problem), max_bytes, gap)


def smallest_bytes(problem: Problem, max_cost: float, gap: float = GAP) -> Allocation:
    """The allocation of the smallest file that is predicted to add at most `max_cost` nats (to 1 part in 10⁹).

    `gap` as in `smallest_cost`, of the bytes. Raises BitladderError that names what is wrong with the problem, or, if
    no allocation is that good, the lowest possible cost.
    """
    if not math.isfinite(max_cost):
        raise BitladderError(f"a KLD of {max_cost} cannot be aimed at")
    choices = choices_of(problem)
    solution = solve(
        choices,
        choices.nbytes,
        [Limit(choices.cost, max_cost), *side_limits(problem, choices)],
        problem.max_types,
        gap,
    )
    if solution is None:
        raise no_cost(problem, choices, max_cost)
    # Bytes are whole; the bound comes from sums of floats and may be a little too high.
    bound = math.ceil(solution.bound - 1e-10 * abs(solution.bound)) + problem.fixed_bytes
    price = float(solution.prices[0])
    return allocation_of(problem, choices, solution.chosen, "bytes", bound, 1 / price if price > 0 else 0.0)


def frontier(problem: Problem, budgets: Iterable[int], gap: float = GAP) -> list[Allocation]:
    """`smallest_cost` for each size, in the order given. Raises what it raises."""
    choices = choices_of(problem)
    return [_smallest_cost(problem, choices, max_bytes, gap) for max_bytes in budgets]


def allocation_of(
    problem: Problem,
    choices: Choices,
    chosen: Index,
    objective: Literal["cost", "bytes"],
    bound: float,
    price: float,
) -> Allocation:
    """The allocation that chooses these items, one per group, with its sums."""
    types = choices.types(chosen)
    used = [{option.type: option for option in menu}[types[name]] for name, menu in problem.options.items()]
    nbytes = problem.fixed_bytes + sum(option.nbytes for option in used)
    cost = math.fsum(option.cost for option in used)
    # The solver adds tied tensors up first: its sum may be a rounding above this one.
    return Allocation(
        {name: types[name] for name in problem.options},
        nbytes,
        cost,
        math.fsum(option.seconds for option in used),
        objective,
        min(bound, cost if objective == "cost" else nbytes),
        price,
    )


def _smallest_cost(problem: Problem, choices: Choices, max_bytes: int | None, gap: float) -> Allocation:
    solution = solve(choices, choices.cost, size_limits(problem, choices, max_bytes), problem.max_types, gap)
    if solution is None:
        raise no_allocation(problem, choices) if max_bytes is None else no_size(problem, choices, max_bytes)
    price = 0.0 if max_bytes is None else float(solution.prices[0])
    return allocation_of(problem, choices, solution.chosen, "cost", solution.bound, price)
