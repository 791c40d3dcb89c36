"""Which swaps to measure: as fine as the budget allows, finer where more is at stake."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from bitladder.engine import TensorType


def probe_type(menu: Sequence[TensorType], bpw: float) -> TensorType:
    """The type of a menu that is nearest to `bpw` bits per weight; of equals the later (q3_K).

    Types of 4-bit floats are no measure for the others. They are used only if the menu has nothing else.
    """
    usual = [kind for kind in menu if not kind.name.endswith("fp4")] or menu
    return min(reversed(usual), key=lambda kind: abs(kind.bpw - bpw))


def runs(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Cuts names, in order, into `count` runs of nearly equal length (at most one run per name).

    Example:
        >>> runs("abcde", 2)
        [('a', 'b'), ('c', 'd', 'e')]
    """
    count = max(1, min(count, len(names)))
    edges = [round(i * len(names) / count) for i in range(count + 1)]
    return [tuple(names[a:b]) for a, b in itertools.pairwise(edges)]


def first_groups(by_kind: Mapping[str, Sequence[str]], budget: int) -> list[tuple[str, ...]]:
    """The groups of neighbouring tensors of a kind that are probed first.

    They are single tensors if `budget` probes suffice for that. Otherwise half of the budget is shared out, so that
    every kind has the same number of runs. The other half is for `split`.
    """
    total = sum(map(len, by_kind.values()))
    if total <= budget:
        return [(name,) for names in by_kind.values() for name in names]
    each = max(1, budget // 2 // max(1, len(by_kind)))
    return [run for names in by_kind.values() for run in runs(names, each)]


def split(measured: Mapping[tuple[str, ...], float]) -> tuple[str, ...] | None:
    """The group that is measured by halves next: of those with several tensors the one with the largest KLD."""
    wide = [group for group in measured if len(group) > 1]
    return max(wide, key=lambda group: measured[group]) if wide else None


def pruned(menu: Iterable[TensorType], errors: Mapping[str, float], slack: float) -> tuple[TensorType, ...]:
    """The menu without the types that lose to another one.

    A type loses if another one that is not larger has an error that is smaller by more than the factor `slack`. The
    squared error cannot tell types within the slack apart; the measurement can.
    """
    menu = list(menu)
    return tuple(
        kind
        for kind in menu
        if not any(
            other.bpw <= kind.bpw and other != kind and errors[other.name] * slack < errors[kind.name] for other in menu
        )
    )


def spaced(kinds: Sequence[str], count: int) -> list[str]:
    """`count` of some types in order, the first and last among them.

    Example:
        >>> spaced(["q3_K", "q4_K", "q5_K", "q6_K", "q8_0"], 3)
        ['q3_K', 'q5_K', 'q8_0']
    """
    if count >= len(kinds):
        return list(kinds)
    if count < 2:
        return [kinds[len(kinds) // 2]]
    return [kinds[round(i * (len(kinds) - 1) / (count - 1))] for i in range(count)]
