"""Recipes near a recipe, to learn from: kinds, or parts of them, one efficient step up or down."""

import collections
import random
from collections.abc import Mapping

from bitladder.plan.allocate import Problem

Places = Mapping[str, tuple[str, int | None]]


def step(problem: Problem, name: str, kind: str, direction: int) -> str:
    """The next type of a tensor on the lower hull of its (bytes, cost), up (+1) or down (−1); its own at the end."""
    here = next(option for option in problem.options[name] if option.type == kind)
    if direction > 0:
        menu = [o for o in problem.options[name] if o.nbytes > here.nbytes and o.cost < here.cost]
        # Most saved for each byte.
        return max(menu, key=lambda o: (here.cost - o.cost) / (o.nbytes - here.nbytes)).type if menu else kind
    menu = [o for o in problem.options[name] if o.nbytes < here.nbytes]
    # Least lost for each byte that is saved.
    return min(menu, key=lambda o: (o.cost - here.cost) / (here.nbytes - o.nbytes)).type if menu else kind


def kind_moves(
    problem: Problem, types: Mapping[str, str], places: Places, groups: list[list[str]] | None = None
) -> list[dict[str, str]]:
    """The recipe with every kind in turn one step up, and one step down."""
    if groups is None:
        by_kind: dict[str, list[str]] = collections.defaultdict(list)
        for name in types:
            by_kind[places[name][0]].append(name)
        groups = list(by_kind.values())
    found = []
    for names in groups:
        for direction in (-1, 1):
            moved = dict(types)
            for name in names:
                moved[name] = _step(problem, name, types[name], direction)
            if moved != dict(types):
                found.append(moved)
    return found


def random_moves(
    problem: Problem, types: Mapping[str, str], places: Places, count: int, seed: int
) -> list[dict[str, str]]:
    """Recipes in which each third of the layers of each kind goes one step up or down, as a coin says."""
    draw = random.Random(seed)
    layers = max((layer for _, layer in places.values() if layer is not None), default=0) + 1
    parts: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for name in types:
        kind, layer = places[name]
        parts[kind, -1 if layer is None else 3 * layer // layers].append(name)
    found = []
    for _ in range(count):
        # As many up as down: the row stays near the size of the recipe.
        signs = [1, -1] * (len(parts) // 2 + 1)
        draw.shuffle(signs)
        moved = dict(types)
        for names, sign in zip(parts.values(), signs, strict=False):
            for name in names:
                moved[name] = _step(problem, name, types[name], sign)
        found.append(moved)
    return found


def _step(problem: Problem, name: str, kind: str, direction: int) -> str:
    return kind if name in problem.pins else step(problem, name, kind, direction)
