"""Which swaps to measure, and the law that leads from a few measurements to a price for every type of every tensor."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bitladder.engine import TensorType
from bitladder.plan.options import LawOptions


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


Errors = Mapping[str, Mapping[str, float]]  # tensor → type → error
FLOOR = 1e-8  # nats; below this a swap cannot be told from rounding
WITH_MINIMUM = {"q4_1", "q5_1", "q2_K", "q4_K", "q5_K"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tensors of one kind that were swapped together: tensor → type, and their KLD in nats per token."""

    types: Mapping[str, str]
    kld: float


@dataclasses.dataclass(frozen=True)
class Law:
    """The fitted law.

    Parameters:
        kld: tensor → type → price, nats per token.
        probe: tensor → its share of its probe's KLD.
        exponent: kind → p.
        predicted: (kind, type) → the prediction without the factor, where the kind was measured.
    """

    kld: dict[str, dict[str, float]]
    probe: dict[str, float]
    exponent: dict[str, float]
    predicted: dict[tuple[str, str], float]


def fit(
    errors: Errors,
    kinds: Mapping[str, str],
    probes: list[Probe],
    groups: Mapping[tuple[str, str], float],
    options: LawOptions,
) -> Law:
    """Prices every type for which a tensor has an error. An error of 0 costs nothing.

    Parameters:
        errors: tensor → type → Σ w (ŵ − w)².
        kinds: tensor → kind.
        probes: measured swaps that cover every tensor once.
        groups: (kind, type) → KLD of all tensors of the kind at that type, nats per token.
        options: how the law is fitted.

    Example:
        One tensor, probed at q3_K, and its kind measured at q3_K and q6_K:

        >>> law = fit(
        ...     {"a": {"q3_K": 4.0, "q6_K": 0.04}}, {"a": "attn_v"}, [Probe({"a": "q3_K"}, 0.1)],
        ...     {("attn_v", "q3_K"): 0.1, ("attn_v", "q6_K"): 0.002}, LawOptions(),
        ... )
        >>> {kind: round(kld, 6) for kind, kld in law.kld["a"].items()}
        {'q3_K': 0.1, 'q6_K': 0.002}
    """
    share, probed_at = _shares(errors, probes)
    exponents, predicted = {}, {}
    prices: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in kinds if kinds[name] == kind]
        known = {name: kld for (of, name), kld in groups.items() if of == kind}
        sums = {name: sum(errors[n][name] for n in names) for name in known}
        exponents[kind] = p = _exponent(sums, known, options)
        base = {name: _law(errors[name], share[name], probed_at[name], p) for name in names}
        measured = {}
        for type_name, kld in known.items():
            predicted[kind, type_name] = sum(base[name][type_name] for name in names)
            measured[type_name] = max(kld, FLOOR) / max(predicted[kind, type_name], FLOOR)
        for name in names:
            prices[name] = {
                type_name: value * _factor(type_name, errors[name], measured) for type_name, value in base[name].items()
            }
    return Law(prices, share, exponents, predicted)


def _shares(errors: Errors, probes: list[Probe]) -> tuple[dict[str, float], dict[str, str]]:
    """Each tensor's share, by error, of its probe's KLD, and the type it was probed at."""
    share: dict[str, float] = {}
    probed_at: dict[str, str] = {}
    for probe in probes:
        total = math.fsum(errors[name][kind] for name, kind in probe.types.items())
        for name, kind in probe.types.items():
            part = errors[name][kind] / total if total > 0 else 1 / len(probe.types)
            share[name], probed_at[name] = max(probe.kld * part, FLOOR), kind
    return share, probed_at


def _law(errors: Mapping[str, float], share: float, probed_at: str, p: float) -> dict[str, float]:
    scale = errors[probed_at]
    return {kind: share * (error / scale) ** p if scale > 0 else 0.0 for kind, error in errors.items()}


def _exponent(errors: Mapping[str, float], klds: Mapping[str, float], options: LawOptions) -> float:
    """The slope of ln KLD over ln error within families, damped towards 1 for few or close types."""
    over = under = options.exponent_damping
    for family in (True, False):
        kinds = [kind for kind in klds if errors[kind] > 0 and (kind in WITH_MINIMUM) == family]
        x = np.array([math.log(errors[kind]) for kind in kinds])
        y = np.array([math.log(max(klds[kind], FLOOR)) for kind in kinds])
        if len(kinds) > 1:
            over += float((x - x.mean()) @ (y - y.mean()))
            under += float((x - x.mean()) @ (x - x.mean()))
    slope = over / under if under > 0 else 1.0
    return float(np.clip(slope, options.least_exponent, options.most_exponent))


def _factor(kind: str, errors: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """The factor of a type, or the larger one of its neighbours in its family (in all types if it has none)."""
    if kind in measured:
        return measured[kind]
    known = {name: factor for name, factor in measured.items() if errors.get(name)}
    family = {name: factor for name, factor in known.items() if (name in WITH_MINIMUM) == (kind in WITH_MINIMUM)}
    family = family or known
    if not family or errors[kind] <= 0:
        return 1.0
    ranked = sorted(family, key=lambda name: errors[name])
    below = [family[name] for name in ranked if errors[name] <= errors[kind]][-1:]
    above = [family[name] for name in ranked if errors[name] > errors[kind]][:1]
    return max(below + above)
