"""What others would do with the same bytes: recipes that the plan is compared with."""

import collections
from collections.abc import Callable, Mapping

from bitladder.calibrate.imatrix import Imatrix
from bitladder.calibrate.statistics import TensorStatistics, tensor_statistics
from bitladder.engine.types import type_by_name
from bitladder.plan.allocate import Problem, greedy
from bitladder.plan.priced_problem import Prices
from bitladder.plan.prices.document import Sensitivity
from bitladder.plan.target import Target

Places = Mapping[str, tuple[str, int | None]]
STATISTICS: dict[str, Callable[[TensorStatistics], float | None]] = {
    "sum": lambda one: one.sum,
    "zd": lambda one: one.zd,
    # A tensor whose input is unlike the previous block's is taken to matter more.
    "cossim": lambda one: None if one.cossim is None else -one.cossim,
}
SHARE = 4  # one tensor in so many goes up, one goes down
STEP = 0.5  # bits per weight that a step is at least


def weighted_error(sensitivity: Sensitivity, build: Callable[[Prices], Problem], target: Target) -> dict[str, str]:
    """The exact solution for the importance-weighted squared error alone, as if that were the loss."""
    errors = {name: dict(tensor.error) for name, tensor in sensitivity.tensors.items()}
    return target.solve(build(errors)).types


def greedy_types(problem: Problem, max_bytes: int) -> dict[str, str]:
    """The same prices, spent greedily."""
    return greedy(problem, max_bytes).types


def uniform(problem: Problem, max_bytes: int) -> dict[str, str] | None:
    """One type for all, where its width allows (the smallest above it elsewhere): the largest that fits.

    None if not even the smallest does.
    """
    kinds = sorted({option.type for menu in problem.options.values() for option in menu}, key=_bpw)
    for wanted in reversed(kinds):
        types = {}
        for name, menu in problem.options.items():
            fitting = [option for option in menu if _bpw(option.type) >= _bpw(wanted)]
            same = [option for option in fitting if option.type == wanted]
            types[name] = (same or sorted(fitting, key=lambda option: option.nbytes))[0].type
        if _size(problem, types) <= max_bytes:
            return types
    return None


def by_statistic(
    problem: Problem, preset: Mapping[str, str], imatrix: Imatrix, statistic: str, places: Places, max_bytes: int
) -> dict[str, str] | None:
    """The preset with the top quarter of each kind, by a statistic of its inputs, a type up, the bottom quarter down.

    Where that is too large, fewer go up. None if a kind has too few tensors for quarters everywhere.
    """
    values = {one.tensor: STATISTICS[statistic](one) for one in tensor_statistics(imatrix)}
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for name in problem.options:
        if values.get(name) is not None and preset[name] in {option.type for option in problem.options[name]}:
            by_kind[places[name][0]].append(name)
    types, raised = {name: preset[name] for name in problem.options}, []
    for names in by_kind.values():
        ranked = sorted(names, key=lambda name: values[name] or 0.0)
        count = len(ranked) // SHARE
        for name in ranked[:count]:
            types[name] = _neighbour(problem, name, preset[name], -1)
        raised += [(rank, name) for rank, name in enumerate(reversed(ranked[len(ranked) - count :]))]
    if not raised:
        return None
    for _, name in sorted(raised):
        higher = types | {name: _neighbour(problem, name, preset[name], 1)}
        if _size(problem, higher) <= max_bytes:
            types = higher
    return types


def _neighbour(problem: Problem, name: str, kind: str, direction: int) -> str:
    """The nearest type of a menu at least STEP bits per weight away."""
    menu = [o.type for o in problem.options[name] if direction * (_bpw(o.type) - _bpw(kind)) >= STEP]
    return min(menu, key=lambda one: (abs(_bpw(one) - _bpw(kind)), one)) if menu else kind


def _bpw(kind: str) -> float:
    return type_by_name(kind).bpw


def _size(problem: Problem, types: Mapping[str, str]) -> int:
    menus = {name: {option.type: option.nbytes for option in menu} for name, menu in problem.options.items()}
    return problem.fixed_bytes + sum(menus[name][kind] for name, kind in types.items())
