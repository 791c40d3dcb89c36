"""Allocations close to a given one, best first, for those who measure and find the prediction a little wrong."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitladder.plan.allocate.choices import Choices, Floats, Index, Integers, choices_of
from bitladder.plan.allocate.limits import Limit, size_limits
from bitladder.plan.allocate.problem import Allocation, Problem


@dataclasses.dataclass(frozen=True)
class Exchange:
    """New types for a few tensors of an allocation (`types`), and the predicted change of its cost and its bytes."""

    types: dict[str, str]
    cost: float
    bytes: int


def neighbours(
    problem: Problem, allocation: Allocation, count: int, max_bytes: int | None = None
) -> Iterator[Exchange]:
    """The `count` best exchanges (or as many as there are), ascending in predicted change of cost.

    An exchange is one tensor (or tied group) changed, or two of which one makes room for the other: in a pair at least
    one change would not fit alone. The result keeps all limits of the problem and has at most `max_bytes` (None: the
    allocation's own). Where `max_types` types are in use already, no exchange brings in another, not even for one that
    it leaves without a tensor. Raises BitladderError if the problem does not allow the allocation's types.
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
    """Changes of one group each, ascending in `merit`: change of cost + price · change of bytes.

    A pair that fits changes the cost by at least the sum of its merits − price · room, and near an optimum no merit
    is much below 0. So pairs of small change are made of moves of small merit.
    `change` [limits, moves] and `room` [limits] belong to the limits, that on bytes first.
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
    """The kinds that a move may lead to."""
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
    """Single moves that fit and pairs of the first `size` moves, by cost, up to where a pair left out might come."""
    alone = _fits(moves, moves.change)
    known = math.inf
    if size < len(moves.items):
        known = float(moves.merit[0] + moves.merit[size] - moves.price * moves.room[0])
    singles = np.flatnonzero(alone)
    found = [np.column_stack([singles, np.full(len(singles), -1)])]
    for first in range(min(size, len(moves.items))):
        rest = slice(first + 1, size)
        fits = _fits(moves, moves.change[:, rest] + moves.change[:, first, None])
        fits &= (moves.group[rest] != moves.group[first]) & ~(alone[rest] & alone[first])
        second = np.flatnonzero(fits & (moves.cost[rest] + moves.cost[first] < known)) + first + 1
        found.append(np.column_stack([np.full(len(second), first), second]))
    places = np.concatenate(found)
    # Place −1 is no move: it changes nothing.
    cost = moves.cost[places[:, 0]] + np.where(places[:, 1] < 0, 0.0, moves.cost[places[:, 1]])
    places, cost = places[cost < known], cost[cost < known]
    for first, second in places[np.lexsort((places[:, 1], places[:, 0], cost))].tolist():
        yield (first,) if second < 0 else (first, second)


def _fits(moves: _Moves, change: Floats) -> npt.NDArray[np.bool_]:
    """Which columns of `change` [limits, columns] keep all limits."""
    return np.asarray((change <= moves.room[:, None]).all(axis=0))


def _few_types(choices: Choices, chosen: Index, items: Index, max_types: int | None) -> bool:
    if max_types is None:
        return True
    after = chosen.copy()
    after[choices.group[items]] = items
    return len(np.unique(choices.kind[after])) <= max_types


def _types(choices: Choices, items: Index) -> dict[str, str]:
    return {name: choices.kinds[choices.kind[item]] for item in items for name in choices.groups[choices.group[item]]}
