"""From a few measurements to a price for every type of every tensor.

A tensor's KLD is taken to grow with its rendered error e as s·e^p. The probe of the tensor (or of the few neighbours
measured with it) at one coarse type gives s; whole kinds measured at each type give p, and a factor for what the law
misses there: errors that are coherent (types with minimums) or that meet within a kind. With probe type P,

    kld[t, T] = probe[t] · (e[t, T] / e[t, P])^p · factor[kind, T],
    factor[kind, T] = measured[kind, T] / Σ_t probe[t] · (e[t, T] / e[t, P])^p.

Types with minimums are a family of their own: the same squared error costs more or less there than elsewhere, but
within a family it follows the power law. So p is fitted with an offset for each family, and a type at which a kind was
not measured takes the larger factor of its own family's neighbours, on the scale of e: what is priced too low is what
an optimiser will take.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

Errors = Mapping[str, Mapping[str, float]]  # tensor → type → error
FLOOR = 1e-8  # nats; below this a swap cannot be told from rounding
RANGE = (0.5, 2.0)  # in which an exponent is believed
WITH_MINIMUM = {"q4_1", "q5_1", "q2_K", "q4_K", "q5_K"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Some tensors of one kind measured together, alone swapped: tensor → type, and their KLD."""

    types: Mapping[str, str]
    kld: float


@dataclasses.dataclass(frozen=True)
class Law:
    """`kld` tensor → type → nats; `probe` tensor → its share of what was measured; `exponent` and `factor` by kind."""

    kld: dict[str, dict[str, float]]
    probe: dict[str, float]
    exponent: dict[str, float]
    predicted: dict[tuple[str, str], float]
    factor: dict[tuple[str, str], float]


def fit(errors: Errors, kinds: Mapping[str, str], probes: list[Probe], groups: Mapping[tuple[str, str], float]) -> Law:
    """Price every type for which a tensor has an error.

    Parameters: `kinds` tensor → kind; `probes` cover every tensor once; `groups` (kind, type) → KLD of all tensors of
    the kind at that type. An error of 0 costs nothing.
    """
    share, at = _shares(errors, probes)
    exponents, factors, predicted = {}, {}, {}
    prices: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in kinds if kinds[name] == kind]
        known = {one: kld for (of, one), kld in groups.items() if of == kind}
        exponents[kind] = p = _exponent({one: sum(errors[n][one] for n in names) for one in known}, known)
        base = {name: _law(errors[name], share[name], at[name], p) for name in names}
        measured = {}
        for one, kld in known.items():
            predicted[kind, one] = sum(base[name][one] for name in names)
            measured[one] = max(kld, FLOOR) / max(predicted[kind, one], FLOOR)
        for name in names:
            prices[name] = {}
            for one, value in base[name].items():
                factor = _factor(one, errors[name], measured)
                factors[kind, one] = factor
                prices[name][one] = value * factor
    return Law(prices, share, exponents, predicted, factors)


def _shares(errors: Errors, probes: list[Probe]) -> tuple[dict[str, float], dict[str, str]]:
    """Each tensor's share of its probe's KLD, by error, and the type it was probed at."""
    share: dict[str, float] = {}
    at: dict[str, str] = {}
    for probe in probes:
        total = math.fsum(errors[name][kind] for name, kind in probe.types.items())
        for name, kind in probe.types.items():
            part = errors[name][kind] / total if total > 0 else 1 / len(probe.types)
            share[name], at[name] = max(probe.kld * part, FLOOR), kind
    return share, at


def _law(errors: Mapping[str, float], share: float, at: str, p: float) -> dict[str, float]:
    scale = errors[at]
    return {kind: share * (error / scale) ** p if scale > 0 else 0.0 for kind, error in errors.items()}


def _exponent(errors: Mapping[str, float], klds: Mapping[str, float]) -> float:
    """The slope of ln KLD over ln error within families, pulled towards 1 where few or close types were measured."""
    over = under = 1.0  # a slope of 1, worth two types at a distance of e
    for family in (True, False):
        kinds = [one for one in klds if errors[one] > 0 and (one in WITH_MINIMUM) == family]
        x = np.array([math.log(errors[one]) for one in kinds])
        y = np.array([math.log(max(klds[one], FLOOR)) for one in kinds])
        if len(kinds) > 1:
            over += float((x - x.mean()) @ (y - y.mean()))
            under += float((x - x.mean()) @ (x - x.mean()))
    return float(np.clip(over / under, *RANGE))


def _factor(kind: str, errors: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """A type's factor, or the larger one of its neighbours in its family (in all types, if it has none)."""
    if kind in measured:
        return measured[kind]
    known = {one: factor for one, factor in measured.items() if errors.get(one)}
    family = {one: factor for one, factor in known.items() if (one in WITH_MINIMUM) == (kind in WITH_MINIMUM)} or known
    if not family or errors[kind] <= 0:
        return 1.0
    ranked = sorted(family, key=lambda one: errors[one])
    below = [family[one] for one in ranked if errors[one] <= errors[kind]][-1:]
    above = [family[one] for one in ranked if errors[one] > errors[kind]][:1]
    return max(below + above)
