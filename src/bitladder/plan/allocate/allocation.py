"""The best allocation for a file size and for a predicted KLD, a greedy one to compare with, and those near the best.

Those near it, best first, are for the case that a measurement proves the prediction a little wrong.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.keys import Algorithm
from bitladder.plan.allocate.problem import (
    Allocation,
    Choices,
    Floats,
    Index,
    Integers,
    Limit,
    Problem,
    choices_of,
    size_limits,
    time_limits,
    total,
)
from bitladder.plan.allocate.solve import relaxed, solve
from bitladder.units import listed, number_of, size_text

ALLOCATION = Algorithm("allocation", ("an exact multiple-choice knapsack under the size of the file",))

# Far below the error of a prediction. The optimum is mostly proved before the search stops here.
GAP = 1e-6


@ALLOCATION.entry
def smallest_cost(problem: Problem, max_bytes: int | None, gap: float = GAP) -> Allocation:
    """The allocation of least predicted KLD for a size of the file.

    It is proved to be within the fraction `gap` of the optimum. If the solver comes to its limit of nodes, the
    allocation states its larger gap.

    Parameters:
        problem: the tensors with their menus, and the constraints.
        max_bytes: largest size of the file; None for any size.
        gap: a fraction of the cost.

    Raises:
        BitladderError: the problem is wrong, or no allocation fits. The error then gives the smallest possible size
            and the constraints that keep it from being smaller.

    Example:
        >>> from bitladder.plan.allocate.problem import Problem, TypeOption
        >>> menu = (TypeOption("q4_K", 45, 0.10), TypeOption("q6_K", 66, 0.01))
        >>> smallest_cost(Problem({"attn_v": menu, "ffn_up": menu}), 111).bytes
        111
    """
    choices = choices_of(problem)
    solution = solve(choices, choices.cost, size_limits(problem, choices, max_bytes), problem.max_types, gap)
    if solution is None:
        raise no_allocation(problem, choices) if max_bytes is None else no_size(problem, choices, max_bytes)
    price = 0.0 if max_bytes is None else float(solution.prices[0])
    return _allocation(problem, choices, solution.chosen, ("cost", solution.bound), price)


@ALLOCATION.entry
def smallest_bytes(problem: Problem, max_cost: float, gap: float = GAP) -> Allocation:
    """The allocation of the smallest file that is predicted to add at most `max_cost` nats per token.

    Parameters:
        problem: the tensors with their menus, and the constraints.
        max_cost: largest predicted KLD, nats per token, to 1 part in 10⁹.
        gap: as in `smallest_cost`, a fraction of the bytes.

    Raises:
        BitladderError: the problem is wrong, or no allocation is that good. The error then gives the lowest cost.
    """
    if not math.isfinite(max_cost):
        raise BitladderError(f"a KLD of {max_cost} is not a possible target")
    choices = choices_of(problem)
    solution = solve(
        choices,
        choices.nbytes,
        [Limit(choices.cost, max_cost), *time_limits(problem, choices)],
        problem.max_types,
        gap,
    )
    if solution is None:
        raise no_cost(problem, choices, max_cost)
    # Bytes are whole. The bound comes from sums of floats and may be a little too high.
    bound = math.ceil(solution.bound - 1e-10 * abs(solution.bound)) + problem.fixed_bytes
    price = float(solution.prices[0])
    return _allocation(problem, choices, solution.chosen, ("bytes", bound), 1 / price if price > 0 else 0.0)


@ALLOCATION.entry
def greedy(problem: Problem, max_bytes: int) -> Allocation:
    """The usual heuristic: starts from the smallest file and changes the tensor that saves most cost per added byte.

    A step may skip types. It keeps all limits and never adds a type beyond `max_types`. The bound is that of the
    linear relaxation. Raises what `smallest_cost` raises.
    """
    choices = choices_of(problem)
    start = solve(choices, choices.nbytes, time_limits(problem, choices), problem.max_types)
    if start is None:
        raise no_allocation(problem, choices)
    limits = size_limits(problem, choices, max_bytes)
    if not all(limit.holds(start.chosen) for limit in limits):
        raise no_size(problem, choices, max_bytes)
    chosen = start.chosen.copy()
    while (step := _best_step(choices, chosen, limits, problem.max_types)) is not None:
        chosen[choices.group[step]] = step
    # Without the limit on types the bound is lower, but still a bound.
    relaxation = relaxed(choices, choices.cost, limits, None)
    if relaxation is None:
        raise no_size(problem, choices, max_bytes)
    return _allocation(problem, choices, chosen, ("cost", relaxation.bound), float(relaxation.prices[0]))


def _best_step(choices: Choices, chosen: Index, limits: Sequence[Limit], max_types: int | None) -> int | None:
    """The item that saves most cost per byte in place of its group's chosen one; None if no item saves and fits."""
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
    # A step that saves cost and adds no byte comes first.
    rate = np.where(added > 0, saved / np.maximum(added, 1), np.inf)
    return int(np.argmax(np.where(better, rate, -np.inf)))


def _allocation(
    problem: Problem, choices: Choices, chosen: Index, goal: tuple[Literal["cost", "bytes"], float], price: float
) -> Allocation:
    """The allocation that chooses these items, one per group, with its sums. `goal` is the objective and its bound."""
    objective, bound = goal
    types = choices.types(chosen)
    used = [{option.type: option for option in menu}[types[name]] for name, menu in problem.options.items()]
    nbytes = problem.fixed_bytes + sum(option.nbytes for option in used)
    cost = math.fsum(option.cost for option in used)
    # The solver adds tied tensors first, so that its sum may be a rounding above this one.
    return Allocation(
        {name: types[name] for name in problem.options},
        nbytes,
        cost,
        math.fsum(option.seconds for option in used),
        objective,
        min(bound, cost if objective == "cost" else nbytes),
        price,
    )


def no_size(problem: Problem, choices: Choices, max_bytes: int) -> BitladderError:
    """Why no allocation fits into `max_bytes`: the smallest possible file, and the constraints behind its size."""
    smallest = solve(choices, choices.nbytes, time_limits(problem, choices), problem.max_types)
    if smallest is None:
        return no_allocation(problem, choices)
    nbytes = int(total(choices.nbytes, smallest.chosen)) + problem.fixed_bytes
    return BitladderError(
        f"no allocation fits into {size_text(max_bytes)}: the smallest possible file has"
        f" {size_text(nbytes)}{_blame(problem, choices, nbytes)}"
    )


def no_cost(problem: Problem, choices: Choices, max_cost: float) -> BitladderError:
    """Why no allocation reaches `max_cost`: the lowest possible cost."""
    lowest = solve(choices, choices.cost, time_limits(problem, choices), problem.max_types)
    if lowest is None:
        return no_allocation(problem, choices)
    return BitladderError(
        f"no allocation is predicted to reach a KLD of {max_cost:g}: the lowest is"
        f" {total(choices.cost, lowest.chosen):.6g}{_with(problem)}"
    )


def no_allocation(problem: Problem, choices: Choices) -> BitladderError:
    """Why there is no allocation of any size: the limit on types or the limit on time cannot be kept."""
    if problem.max_types is not None and solve(choices, choices.cost, [], problem.max_types) is None:
        return BitladderError(
            f"no allocation uses only {number_of(problem.max_types, 'different type')}{_with(problem)}; "
            f"{_fewest_types(choices)} are needed"
        )
    fastest = solve(choices, choices.seconds, [], problem.max_types)
    assert fastest is not None and problem.max_seconds is not None  # without a limit on time there is an allocation
    return BitladderError(
        f"no allocation is predicted to generate at least {1 / problem.max_seconds:,.4g} tokens/s: the fastest has"
        f" {1 / total(choices.seconds, fastest.chosen):,.4g}{_with(problem)}"
    )


def _fewest_types(choices: Choices) -> int:
    return next(k for k in range(1, len(choices.kinds) + 1) if solve(choices, choices.cost, [], k) is not None)


def _with(problem: Problem) -> str:
    """The constraints, as text behind a figure."""
    parts = [f"{len(problem.pins)} pinned"] if problem.pins else []
    parts += [f"{len(problem.floors)} with a floor"] if problem.floors else []
    parts += [f"{sum(map(len, problem.ties))} tied"] if problem.ties else []
    text = f" (tensors: {', '.join(parts)})" if parts else ""
    return text + (f" and at most {number_of(problem.max_types, 'type')}" if problem.max_types is not None else "")


def _blame(problem: Problem, choices: Choices, nbytes: int) -> str:
    """How many bytes of the smallest file each kind of constraint costs, and which tensor costs most."""
    alone = {name: min(option.nbytes for option in menu) for name, menu in problem.options.items()}
    starts = np.flatnonzero(np.diff(choices.group, prepend=-1))
    kept = np.minimum.reduceat(choices.nbytes, starts)
    extra = {
        names: int(least) - sum(alone[name] for name in names)
        for names, least in zip(choices.groups, kept, strict=True)
    }
    parts = []
    if (menus := sum(extra.values())) > 0:
        most = max(extra, key=lambda names: extra[names])
        kinds = (("pins", problem.pins), ("floors", problem.floors), ("ties", problem.ties))
        why = listed([word for word, constraint in kinds if constraint])
        parts.append(f"{size_text(menus)} of it because of {why}, {size_text(extra[most])} for {_named(problem, most)}")
    if (others := nbytes - problem.fixed_bytes - menus - sum(alone.values())) > 0:
        parts.append(f"{size_text(others)} because of limits on types or time")
    return f" ({'; '.join(parts)})" if parts else ""


def _named(problem: Problem, names: tuple[str, ...]) -> str:
    """The tensors of a group, with their pin or floor."""
    name = next((name for name in names if name in problem.pins or name in problem.floors), names[0])
    what = f" (pinned to {problem.pins[name]})" if name in problem.pins else ""
    if not what and name in problem.floors:
        what = f" (floor {problem.floors[name]:g} bpw)"
    return f"{name}{what}" + (f" and {len(names) - 1} tied to it" if len(names) > 1 else "")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """New types for a few tensors of an allocation (`types`), and the predicted change of its cost and its bytes."""

    types: dict[str, str]
    cost: float
    bytes: int


def neighbours(
    problem: Problem, allocation: Allocation, count: int, max_bytes: int | None = None
) -> Iterator[Exchange]:
    """The best exchanges, ascending in predicted change of cost.

    An exchange changes one tensor (or tied group), or two. In a pair at least one change does not fit alone: the other
    makes room for it. The result keeps all limits of the problem. Where `max_types` types are in use, no exchange
    brings in another type.

    Parameters:
        problem: the problem of the allocation.
        allocation: where exchanges start from.
        count: the most exchanges to yield.
        max_bytes: largest size of the file; None for that of the allocation.

    Raises:
        BitladderError: the problem does not allow the allocation's types.
    """
    choices = choices_of(problem)
    chosen = choices.items_of(allocation.types)
    limits = size_limits(problem, choices, allocation.bytes if max_bytes is None else max_bytes)
    moves = _moves(choices, chosen, limits, allocation.price, _open_kinds(choices, chosen, problem.max_types))
    seen: set[tuple[int, ...]] = set()
    size = 256
    while True:
        for places in _in_order(moves, size):
            if len(seen) == count:
                return
            items = moves.items[list(places)]
            if places not in seen and _few_types(choices, chosen, items, problem.max_types):
                seen.add(places)
                cost, nbytes = math.fsum(moves.cost[list(places)]), int(moves.nbytes[list(places)].sum())
                yield Exchange(_types(choices, items), cost, nbytes)
        if size >= len(moves.items):
            return
        size *= 2


@dataclasses.dataclass(frozen=True)
class _Moves:
    """Changes of one group each, ascending in merit.

    A pair that fits changes the cost by at least the sum of its merits − price · room. Near an optimum no merit is much
    below 0. So pairs of small change consist of moves of small merit.

    Parameters:
        items: the new item, shape [moves].
        group: its group, shape [moves].
        cost: change of cost, nats per token, shape [moves].
        nbytes: change of bytes, shape [moves].
        merit: change of cost + price · change of bytes, shape [moves].
        change: change of each limit's sum, the limit on bytes first, shape [limits, moves].
        room: what is left of each limit, shape [limits].
        price: nats per byte.
    """

    items: Index
    group: Index
    cost: Floats
    nbytes: Integers
    merit: Floats
    change: Floats
    room: Floats
    price: float


def _open_kinds(choices: Choices, chosen: Index, max_types: int | None) -> Index:
    """The types that a move may lead to."""
    used = np.unique(choices.kind[chosen])
    return used if max_types is not None and len(used) >= max_types else np.arange(len(choices.kinds))


def _moves(choices: Choices, chosen: Index, limits: list[Limit], price: float, kinds: Index) -> _Moves:
    before = chosen[choices.group]
    cost, nbytes = choices.cost - choices.cost[before], choices.nbytes - choices.nbytes[before]
    merit = cost + price * nbytes
    items = np.argsort(merit, kind="stable")
    items = items[(items != before[items]) & np.isin(choices.kind[items], kinds)]
    change = np.array([limit.values - limit.values[before] for limit in limits], np.float64)
    room = np.array([limit.room(limit.values[chosen]) for limit in limits], np.float64)
    return _Moves(items, choices.group[items], cost[items], nbytes[items], merit[items], change[:, items], room, price)


def _in_order(moves: _Moves, size: int) -> Iterator[tuple[int, ...]]:
    """Single moves that fit and pairs of the first `size` moves, by cost, up to the least cost of a pair left out."""
    alone = _fits(moves, moves.change)
    known = math.inf
    if size < len(moves.items):
        known = float(moves.merit[0] + moves.merit[size] - moves.price * moves.room[0])
    singles = np.flatnonzero(alone)
    candidates = [np.column_stack([singles, np.full(len(singles), -1)])]
    for first in range(min(size, len(moves.items))):
        rest = slice(first + 1, size)
        fits = _fits(moves, moves.change[:, rest] + moves.change[:, first, None])
        fits &= (moves.group[rest] != moves.group[first]) & ~(alone[rest] & alone[first])
        second = np.flatnonzero(fits & (moves.cost[rest] + moves.cost[first] < known)) + first + 1
        candidates.append(np.column_stack([np.full(len(second), first), second]))
    places = np.concatenate(candidates)
    # Place −1 stands for no move.
    cost = moves.cost[places[:, 0]] + np.where(places[:, 1] < 0, 0.0, moves.cost[places[:, 1]])
    places, cost = places[cost < known], cost[cost < known]
    for first, second in places[np.lexsort((places[:, 1], places[:, 0], cost))].tolist():
        yield (first,) if second < 0 else (first, second)


def _fits(moves: _Moves, change: Floats) -> npt.NDArray[np.bool_]:
    """Which columns of `change` (shape [limits, columns]) keep all limits."""
    return np.asarray((change <= moves.room[:, None]).all(axis=0))


def _few_types(choices: Choices, chosen: Index, items: Index, max_types: int | None) -> bool:
    if max_types is None:
        return True
    after = chosen.copy()
    after[choices.group[items]] = items
    return len(np.unique(choices.kind[after])) <= max_types


def _types(choices: Choices, items: Index) -> dict[str, str]:
    return {name: choices.kinds[choices.kind[item]] for item in items for name in choices.groups[choices.group[item]]}
