"""From a few measurements to a price for every type of every tensor.

A tensor's KLD is taken to grow with its rendered error e as s·e^p. The probe of the tensor (or of the few neighbours
measured with it) at one coarse type gives s; whole kinds measured at each type give p, and a factor for what the law
misses there: errors that are coherent (types with minimums) or that meet within a kind. With probe type P,

    kld[t, T] = probe[t] · (e[t, T] / e[t, P])^p · factor[kind, T],
    factor[kind, T] = measured[kind, T] / Σ_t probe[t] · (e[t, T] / e[t, P])^p.

A type at which a kind was not measured takes its factor from the nearest types that were, on the scale of ln e.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

Errors = Mapping[str, Mapping[str, float]]  # tensor → type → error
FLOOR = 1e-8  # nats; below this a swap cannot be told from rounding
RANGE = (0.5, 2.0)  # in which an exponent is believed


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
        exponents[kind] = p = _exponent([sum(errors[n][one] for n in names) for one in known], list(known.values()))
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


def _exponent(errors: list[float], klds: list[float]) -> float:
    """The slope of ln KLD over ln error, pulled towards 1 where few or close types were measured."""
    points = [(math.log(e), math.log(max(k, FLOOR))) for e, k in zip(errors, klds, strict=True) if e > 0]
    if len(points) < 2:
        return 1.0
    x, y = (np.array(column) for column in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    prior = 1.0  # a slope of 1, worth two types at a distance of e
    return float(np.clip((x @ y + prior) / (x @ x + prior), *RANGE))


def _factor(kind: str, errors: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """A type's factor, or one interpolated between its neighbours in ln e."""
    if kind in measured:
        return measured[kind]
    points = sorted((math.log(errors[one]), math.log(factor)) for one, factor in measured.items() if errors.get(one))
    if not points or errors[kind] <= 0:
        return 1.0
    x, y = zip(*points, strict=True)
    return float(math.exp(np.interp(math.log(errors[kind]), x, y)))
