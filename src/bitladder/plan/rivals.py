"""Other ways to spend the same bytes: recipes that the plan is compared with."""

import collections
from collections.abc import Callable, Mapping

from bitladder.calibrate import Imatrix, TensorStatistics, tensor_statistics
from bitladder.engine import type_by_name
from bitladder.plan.allocate.allocation import greedy
from bitladder.plan.allocate.problem import Problem
from bitladder.plan.corrections import Places
from bitladder.plan.options import RivalOptions
from bitladder.plan.prices.document import TypePrices
from bitladder.plan.problem import Prices
from bitladder.plan.subject import Preset, Subject
from bitladder.plan.target import Target

# What tables call a statistic, and its value: tensors with larger values are taken to matter more.
STATISTICS: dict[str, Callable[[TensorStatistics], float | None]] = {
    "Σ(Act²)": lambda tensor: tensor.sum,
    "ZD": lambda tensor: tensor.zd,
    # A tensor matters more whose input is unlike the previous block's.
    "CosSim": lambda tensor: None if tensor.cossim is None else -tensor.cossim,
}


def rivals(
    subject: Subject, preset: Preset, prices: TypePrices, build: Callable[[Prices], Problem], options: RivalOptions
) -> dict[str, dict[str, str]]:
    """Recipes in at most the preset's bytes: the preset moved by statistics, and simpler allocations.

    Parameters:
        subject: the model.
        preset: the preset.
        prices: prices of types.
        build: makes a problem of prices.
        options: how far the preset is moved.

    Returns:
        Name → tensor → type.
    """
    problem = build(prices_of(prices))
    recipes: dict[str, dict[str, str] | None] = {}
    if subject.imatrix is not None:
        for name, types in moved_presets(problem, preset, subject.imatrix, subject.places, options).items():
            recipes[f"preset moved by {name}"] = types
    recipes["weighted error"] = weighted_error(prices, build, Target("", max_bytes=preset.bytes))
    recipes["greedy"] = greedy(problem, preset.bytes).types
    return {name: types for name, types in recipes.items() if types is not None}


def prices_of(prices: TypePrices) -> dict[str, dict[str, float]]:
    """Tensor → type → predicted KLD, nats per token."""
    return {name: dict(tensor.kld) for name, tensor in prices.tensors.items()}


def weighted_error(prices: TypePrices, build: Callable[[Prices], Problem], target: Target) -> dict[str, str]:
    """The exact solution for the importance-weighted squared error alone, as if that were the loss."""
    errors = {name: dict(tensor.error) for name, tensor in prices.tensors.items()}
    return target.solve(build(errors)).types


def uniform(problem: Problem, max_bytes: int) -> dict[str, str] | None:
    """The largest type that fits, for all tensors. Where a width cannot hold it, the smallest type above it.

    Returns None if not even the smallest type fits.
    """
    kinds = sorted({option.type for menu in problem.options.values() for option in menu}, key=_bpw)
    for kind in reversed(kinds):
        types = {}
        for name, menu in problem.options.items():
            large = [option for option in menu if _bpw(option.type) >= _bpw(kind)]
            same = [option for option in large if option.type == kind]
            types[name] = (same or sorted(large, key=lambda option: option.nbytes))[0].type
        if _size(problem, types) <= max_bytes:
            return types
    return None


def moved_presets(
    problem: Problem, preset: Preset, imatrix: Imatrix, places: Places, options: RivalOptions
) -> dict[str, dict[str, str] | None]:
    """The preset moved by each statistic of the tensors' inputs.

    In each kind the quarter with the largest values goes a type up, the quarter with the smallest a type down. Where
    that is too large, fewer go up. A recipe is None if every kind has too few tensors for quarters.

    Parameters:
        problem: menus, and the bytes of each type.
        preset: where the recipes start from, and the most bytes they may have.
        imatrix: the importance matrix.
        places: tensor → (kind, layer).
        options: which share of tensors moves, and how far.
    """
    statistics = list(tensor_statistics(imatrix))
    recipes = {}
    for label, statistic in STATISTICS.items():
        values = {tensor.tensor: value for tensor in statistics if (value := statistic(tensor)) is not None}
        recipes[label] = _moved(problem, preset, values, places, options)
    return recipes


def _moved(
    problem: Problem, preset: Preset, values: Mapping[str, float], places: Places, options: RivalOptions
) -> dict[str, str] | None:
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for name in problem.options:
        if name in values and preset.types[name] in {option.type for option in problem.options[name]}:
            by_kind[places[name][0]].append(name)
    types, raised = {name: preset.types[name] for name in problem.options}, []
    for names in by_kind.values():
        ranked = sorted(names, key=lambda name: values[name])
        count = len(ranked) // options.moved_share
        for name in ranked[:count]:
            types[name] = _neighbour(problem, name, preset.types[name], -options.moved_bpw)
        raised += [(rank, name) for rank, name in enumerate(reversed(ranked[len(ranked) - count :]))]
    if not raised:
        return None
    for _, name in sorted(raised):
        higher = types | {name: _neighbour(problem, name, preset.types[name], options.moved_bpw)}
        if _size(problem, higher) <= preset.bytes:
            types = higher
    return types


def _neighbour(problem: Problem, name: str, kind: str, bpw: float) -> str:
    """The nearest type of a menu that is at least `bpw` bits per weight larger (or, if negative, smaller)."""
    gaps = {option.type: _bpw(option.type) - _bpw(kind) for option in problem.options[name]}
    menu = [type_name for type_name, gap in gaps.items() if (gap >= bpw if bpw > 0 else gap <= bpw)]
    return min(menu, key=lambda type_name: (abs(gaps[type_name]), type_name)) if menu else kind


def _bpw(kind: str) -> float:
    return type_by_name(kind).bpw


def _size(problem: Problem, types: Mapping[str, str]) -> int:
    menus = {name: {option.type: option.nbytes for option in menu} for name, menu in problem.options.items()}
    return problem.fixed_bytes + sum(menus[name][kind] for name, kind in types.items())
