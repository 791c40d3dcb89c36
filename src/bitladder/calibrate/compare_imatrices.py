"""How differently two texts, or two runs, exercise the same model."""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry
from bitladder.calibrate.input_figures import Doubles, cosine, weighted_mean
from bitladder.errors import BitladderError
from bitladder.gguf import imatrix_order, imatrix_place


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How one weight differs, or the average over a group of weights, weighted by N. None is what is not defined.

    All is taken over mean activations of experts that a token reached in both imatrices.

    Parameters:
        tensor: the weight, None for a group.
        layer: its block, or the group's.
        kind: its kind, or the group's.
        tensors: weights in the group, or 1.
        n: columns.
        sum_a: Σ(Act²) in the first imatrix.
        sum_b: Σ(Act²) in the second.
        change: (sum_b − sum_a)/sum_a, a fraction of 1; infinite if only sum_a is 0.
        cosine: of the two vectors of activations.
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
class ImatrixComparison:
    """How two imatrices differ.

    Parameters:
        differences: of each weight, the largest change first.
        only_a: weights with data in the first imatrix only.
        only_b: weights with data in the second only.
        experts_only_a: experts with data in the first only, by weight.
        experts_only_b: experts with data in the second only, by weight.
    """

    differences: list[TensorDifference]
    only_a: list[str]
    only_b: list[str]
    experts_only_a: dict[str, list[int]]
    experts_only_b: dict[str, list[int]]

    def of_kinds(self, kinds: Collection[str]) -> "ImatrixComparison":
        """Only what is about weights of these kinds; everything if no kind is named."""

        def kept(names: Iterable[str]) -> list[str]:
            return [name for name in names if not kinds or imatrix_place(name)[1] in kinds]

        return ImatrixComparison(
            [difference for difference in self.differences if not kinds or difference.kind in kinds],
            kept(self.only_a),
            kept(self.only_b),
            {name: self.experts_only_a[name] for name in kept(self.experts_only_a)},
            {name: self.experts_only_b[name] for name in kept(self.experts_only_b)},
        )

    def sides(self) -> dict[str, Any]:
        """What only one of the two has, as JSON."""
        return {
            "only_a": self.only_a,
            "only_b": self.only_b,
            "experts_only_a": self.experts_only_a,
            "experts_only_b": self.experts_only_b,
        }


def compare_imatrices(a: Imatrix, b: Imatrix) -> ImatrixComparison:
    """Compares two imatrices of one model, weight by weight, in float64.

    Raises BitladderError if a weight has another shape in the other, or if no weight is in both.
    """
    with_data = [{n for n, e in imatrix.entries.items() if (e.counts > 0).any()} for imatrix in (a, b)]
    if not set(a.entries) & set(b.entries):
        raise BitladderError("the two imatrices have no weight in common: these are of two models")
    differences, only_a, only_b = [], {}, {}
    for name in sorted(set(a.entries) & set(b.entries), key=imatrix_order):
        entry_a, entry_b = _aligned(name, a.entries[name], b.entries[name])
        reached_a, reached_b = entry_a.counts > 0, entry_b.counts > 0
        only_a[name] = np.flatnonzero(reached_a & ~reached_b).tolist()
        only_b[name] = np.flatnonzero(reached_b & ~reached_a).tolist()
        both = reached_a & reached_b
        if both.any():
            differences.append(_difference(name, _means(entry_a, both), _means(entry_b, both)))
    return ImatrixComparison(
        differences=sorted(differences, key=lambda d: magnitude(d.change), reverse=True),
        only_a=sorted(with_data[0] - with_data[1], key=imatrix_order),
        only_b=sorted(with_data[1] - with_data[0], key=imatrix_order),
        experts_only_a={n: who for n, who in only_a.items() if who and n in with_data[1]},
        experts_only_b={n: who for n, who in only_b.items() if who and n in with_data[0]},
    )


def grouped_differences(differences: Iterable[TensorDifference], by: str) -> list[TensorDifference]:
    """Averages for each "layer" or "kind", weighted by N. The change is that of the averages."""
    groups: dict[int | str | None, list[TensorDifference]] = {}
    for difference in differences:
        groups.setdefault(difference.layer if by == "layer" else difference.kind, []).append(difference)
    averages = []
    for key, members in groups.items():
        # A weight without a sum in one of them would look like a change.
        whole = [d for d in members if d.sum_a is not None and d.sum_b is not None]
        sum_a, sum_b = weighted_mean((d.n, d.sum_a) for d in whole), weighted_mean((d.n, d.sum_b) for d in whole)
        averages.append(
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
    return sorted(averages, key=lambda d: magnitude(d.change), reverse=True)


def magnitude(change: float | None) -> float:
    """|change|, and −1 where it is not defined, so that it sorts last."""
    return -1.0 if change is None else abs(change)


def _aligned(name: str, a: ImatrixEntry, b: ImatrixEntry) -> tuple[ImatrixEntry, ImatrixEntry]:
    """Both entries with a count for each expert: a .dat file has one for all of them."""
    experts = max(len(a.counts), len(b.counts))
    if a.sums.size != b.sums.size or not {len(a.counts), len(b.counts)} <= {1, experts}:
        raise BitladderError(f"{name} is {_shape(a)} in one and {_shape(b)} in the other: these are of two models")
    spread = [
        ImatrixEntry(entry.sums.reshape(experts, -1), np.repeat(entry.counts, experts // len(entry.counts)))
        for entry in (a, b)
    ]
    return spread[0], spread[1]


def _shape(entry: ImatrixEntry) -> str:
    return " × ".join(map(str, entry.sums.shape[::-1]))


def _means(entry: ImatrixEntry, which: np.ndarray) -> Doubles:
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
    """The change from a to b.

    Example:
        >>> _change(2.0, 3.0), _change(0.0, 1.0), _change(None, 1.0)
        (0.5, inf, None)
    """
    if a is None or b is None:
        return None
    if a == 0:
        return 0.0 if b == 0 else math.inf
    return (b - a) / a
