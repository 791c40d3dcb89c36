"""Which swaps to measure: as fine as a budget allows, finer where more is at stake."""

import itertools
import random
from collections.abc import Mapping, Sequence

from bitladder.engine.types import TensorType

COARSE = 3.5  # bits per weight of the type to probe with: KLD far above noise, and not yet broken


def probe_type(menu: Sequence[TensorType]) -> TensorType:
    """The type to probe a tensor with: the one nearest to COARSE bits per weight; of equals, the later (q3_K).

    Formats of 4-bit floats are no measure for the others, and are taken only if there is nothing else.
    """
    usual = [kind for kind in menu if not kind.name.endswith("fp4")] or menu
    return min(reversed(usual), key=lambda kind: abs(kind.bpw - COARSE))


def runs(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Names in order, cut into `count` runs of lengths as equal as can be (at most one run per name)."""
    count = max(1, min(count, len(names)))
    edges = [round(i * len(names) / count) for i in range(count + 1)]
    return [tuple(names[a:b]) for a, b in itertools.pairwise(edges)]


def first_groups(by_kind: Mapping[str, Sequence[str]], budget: int) -> list[tuple[str, ...]]:
    """Neighbouring tensors of a kind to probe together at first: single ones if `budget` probes are enough for that.

    Else half of the budget, dealt out so that every kind has the same number of runs; the rest is for `split`.
    """
    total = sum(map(len, by_kind.values()))
    if total <= budget:
        return [(name,) for names in by_kind.values() for name in names]
    each = max(1, budget // 2 // max(1, len(by_kind)))
    return [run for names in by_kind.values() for run in runs(names, each)]


def split(measured: Mapping[tuple[str, ...], float]) -> tuple[str, ...] | None:
    """The group to be measured by halves next: the one with the largest KLD of those that have several tensors."""
    wide = [group for group in measured if len(group) > 1]
    return max(wide, key=lambda group: measured[group]) if wide else None


def spaced(kinds: Sequence[str], count: int) -> list[str]:
    """`count` of some types in order, the first and last among them."""
    if count >= len(kinds):
        return list(kinds)
    if count < 2:
        return [kinds[len(kinds) // 2]]
    return [kinds[round(i * (len(kinds) - 1) / (count - 1))] for i in range(count)]


def held_out(menus: Mapping[str, Sequence[str]], used: Mapping[str, str], count: int, seed: int = 1) -> dict[str, str]:
    """Pairs (tensor, type) to check predictions with: drawn, none of which was measured by itself."""
    draw = random.Random(seed)
    names = [name for name in sorted(menus) if any(kind != used.get(name) for kind in menus[name])]
    chosen = draw.sample(names, min(count, len(names)))
    return {name: draw.choice([kind for kind in menus[name] if kind != used.get(name)]) for name in chosen}
