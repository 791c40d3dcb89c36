"""Allocations near an allocation, best first, for the case that a measurement proves the prediction a little wrong."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

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
)


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
