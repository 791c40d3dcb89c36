"""How differently two texts, or two runs, exercise the same model."""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from bitladder.calibrate.imatrix import Entry, Imatrix
from bitladder.calibrate.statistics.figures import Doubles, cosine
from bitladder.calibrate.statistics.groups import weighted_mean
from bitladder.errors import BitladderError
from bitladder.gguf.names import imatrix_order, imatrix_place


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """One weight in both, or the average of a group of them (`tensors` > 1, weighted by N).

    Taken over the `n` mean activations a of experts reached in both: `sum_a` and `sum_b` are Σ(Act²), `change` is
    (sum_b − sum_a)/sum_a, a fraction of 1, infinite from nothing to something; `cosine` that of the two vectors a.
    None is what is not defined.
    """

    tensor: str | None
    layer: int | None
    kind: str | None
    tensors: int
    n: int
    sum_a: float | None
    sum_b: float | None
    change: float | None
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`differences` by largest change first; weights, and experts by weight, that have data on one side only."""

    differences: list[TensorDifference]
    only_a: list[str]
    only_b: list[str]
    experts_only_a: dict[str, list[int]]
    experts_only_b: dict[str, list[int]]

    def of_kinds(self, kinds: Collection[str]) -> "Comparison":
        """Only weights of these kinds; all of them if there are no kinds."""

        def kept(names: Iterable[str]) -> list[str]:
            return [name for name in names if not kinds or imatrix_place(name)[1] in kinds]

        return Comparison(
            [difference for difference in self.differences if not kinds or difference.kind in kinds],
            kept(self.only_a),
            kept(self.only_b),
            {name: self.experts_only_a[name] for name in kept(self.experts_only_a)},
            {name: self.experts_only_b[name] for name in kept(self.experts_only_b)},
        )

    def sides(self) -> dict[str, Any]:
        """What is on one side only, as JSON."""
        return {
            "only_a": self.only_a,
            "only_b": self.only_b,
            "experts_only_a": self.experts_only_a,
            "experts_only_b": self.experts_only_b,
        }


def compare(a: Imatrix, b: Imatrix) -> Comparison:
    """Compare two imatrices of one model, weight by weight, in float64.

    Raises BitladderError if a weight has another shape in the other, or if they have none in common: these are of two
    models.
    """
    with_data = [{n for n, e in imatrix.entries.items() if (e.counts > 0).any()} for imatrix in (a, b)]
    if not set(a.entries) & set(b.entries):
        raise BitladderError("the two imatrices have no weight in common: these are of two models")
    differences, only_a, only_b = [], {}, {}
    for name in sorted(set(a.entries) & set(b.entries), key=imatrix_order):
        one, two = _aligned(name, a.entries[name], b.entries[name])
        reached_a, reached_b = one.counts > 0, two.counts > 0
        only_a[name] = np.flatnonzero(reached_a & ~reached_b).tolist()
        only_b[name] = np.flatnonzero(reached_b & ~reached_a).tolist()
        both = reached_a & reached_b
        if both.any():
            differences.append(_difference(name, _means(one, both), _means(two, both)))
    return Comparison(
        differences=sorted(differences, key=lambda d: magnitude(d.change), reverse=True),
        only_a=sorted(with_data[0] - with_data[1], key=imatrix_order),
        only_b=sorted(with_data[1] - with_data[0], key=imatrix_order),
        experts_only_a={n: who for n, who in only_a.items() if who and n in with_data[1]},
        experts_only_b={n: who for n, who in only_b.items() if who and n in with_data[0]},
    )


def grouped(differences: Iterable[TensorDifference], by: str) -> list[TensorDifference]:
    """Averages per "layer" or "kind", weighted by N; the change is that of the averages."""
    groups: dict[int | str | None, list[TensorDifference]] = {}
    for difference in differences:
        groups.setdefault(difference.layer if by == "layer" else difference.kind, []).append(difference)
    found = []
    for key, members in groups.items():
        # A weight that has a sum on one side only would be a change that is none.
        whole = [d for d in members if d.sum_a is not None and d.sum_b is not None]
        sum_a, sum_b = weighted_mean((d.n, d.sum_a) for d in whole), weighted_mean((d.n, d.sum_b) for d in whole)
        found.append(
            TensorDifference(
                tensor=None,
                layer=key if isinstance(key, int) else None,
                kind=key if isinstance(key, str) else None,
                tensors=len(members),
                n=sum(d.n for d in members),
                sum_a=sum_a,
                sum_b=sum_b,
                change=_change(sum_a, sum_b),
                cosine=weighted_mean((d.n, d.cosine) for d in members),
            )
        )
    return sorted(found, key=lambda d: magnitude(d.change), reverse=True)


def magnitude(change: float | None) -> float:
    """|change|, and less than any where there is none."""
    return -1.0 if change is None else abs(change)


def _aligned(name: str, a: Entry, b: Entry) -> tuple[Entry, Entry]:
    """The two with a count for each expert: a .dat file has one for all of them."""
    experts = max(len(a.counts), len(b.counts))
    if a.sums.size != b.sums.size or not {len(a.counts), len(b.counts)} <= {1, experts}:
        raise BitladderError(f"{name} is {_shape(a)} in one and {_shape(b)} in the other: these are of two models")
    spread = [
        Entry(entry.sums.reshape(experts, -1), np.repeat(entry.counts, experts // len(entry.counts)))
        for entry in (a, b)
    ]
    return spread[0], spread[1]


def _shape(entry: Entry) -> str:
    return " × ".join(map(str, entry.sums.shape[::-1]))


def _means(entry: Entry, which: np.ndarray) -> Doubles:
    means: Doubles = entry.sums[which].astype(np.float64) / entry.counts[which, None]
    return means.reshape(-1)


def _difference(name: str, a: Doubles, b: Doubles) -> TensorDifference:
    layer, kind = imatrix_place(name)
    sums = [float(x.sum()) if np.isfinite(x).all() else None for x in (a, b)]
    return TensorDifference(
        tensor=name,
        layer=layer,
        kind=kind,
        tensors=1,
        n=a.size,
        sum_a=sums[0],
        sum_b=sums[1],
        change=_change(*sums),
        cosine=cosine(a, b),
    )


def _change(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    if a == 0:
        return 0.0 if b == 0 else math.inf
    return (b - a) / a
