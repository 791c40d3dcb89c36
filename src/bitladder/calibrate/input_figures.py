"""Figures of weights' inputs, their averages over a layer or a kind, and the differences of two importance matrices.

All are taken over a_j = Σx²/count, the mean squared input of column j of each expert that a token reached. Sums are
float64. Definitions: llama.cpp, tools/imatrix/imatrix.cpp (--show-statistics), which sums in float32. Its averages
count a tensor without a CosSim as 0; here such a tensor does not take part in that average.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry
from bitladder.errors import BitladderError
from bitladder.gguf import imatrix_order, imatrix_place, in_previous_block

Doubles = npt.NDArray[np.float64]
ACTIVE = 1e-5  # a mean squared input above it counts as active


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """Figures of one weight. None is what is not defined; with a value that is not finite, that is all but `n`.

    Parameters:
        tensor: its name.
        layer: its block, None outside of blocks.
        kind: such as "attn_q".
        sum: in squared units of activations, as are `min`, `max`, `mean` and `std`.
        active: a fraction of 1, as are `entropy_norm` and `zd`.
        n: columns of all experts that a token reached.
        entropy: in bits.
        cossim: cosine with the same tensor of the previous block.
        experts: matrices that have a count of their own, 1 in a dense weight.
        unreached: those without a token.
    """

    tensor: str
    layer: int | None
    kind: str
    sum: float | None
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    active: float | None
    n: int
    entropy: float | None
    entropy_norm: float | None
    zd: float | None
    cossim: float | None
    experts: int
    unreached: int


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """Averages over a layer (`kind` None) or a kind (`layer` None), weighted by N; None where no tensor has a value.

    Parameters:
        layer: the block.
        kind: the kind.
        tensors: weights in the group.
        n: columns of all its weights.
        sum: as of TensorStatistics, like the others.
    """

    layer: int | None
    kind: str | None
    tensors: int
    sum: float | None
    active: float | None
    n: int
    entropy_norm: float | None
    zd: float | None
    cossim: float | None


def tensor_statistics(imatrix: Imatrix) -> list[TensorStatistics]:
    """The figures of every weight that a token reached, by block and kind."""
    return [
        _figures(name, imatrix)
        for name in sorted(imatrix.entries, key=imatrix_order)
        if (imatrix.entries[name].counts > 0).any()
    ]


def mean_activations(entry: ImatrixEntry) -> Doubles:
    """a, float64 [experts reached, n_in]: mean squared inputs of the experts that a token reached."""
    reached = entry.counts > 0
    return entry.sums[reached].astype(np.float64) / entry.counts[reached, None]


def cosine(a: Doubles, b: Doubles) -> float | None:
    """The cosine of the angle between two float64 vectors; None if one is zero or not finite, or if sizes differ."""
    if a.size != b.size:
        return None
    magnitude = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / magnitude if magnitude > 0 and math.isfinite(magnitude) else None


def activation_figures(activations: Doubles) -> dict[str, float | int | None]:
    """The figures of mean activations, float64 [N] with N ≥ 1, by the field names of TensorStatistics.

    σ is that of the population. Entropy is 0 where all activations are 0, as in llama-imatrix. E(norm) = H/log2 N is
    not defined at N = 1.

    Example:
        >>> figures = activation_figures(np.array([1.0, 0.0, 1.0, 0.0]))
        >>> figures["sum"], figures["active"], figures["entropy"], figures["entropy_norm"]
        (2.0, 0.5, 1.0, 0.5)
    """
    n = activations.size
    if not np.isfinite(activations).all():
        names = ("sum", "min", "max", "mean", "std", "active", "entropy", "entropy_norm", "zd")
        return {"n": n, **dict.fromkeys(names)}
    total, least, most = float(activations.sum()), float(activations.min()), float(activations.max())
    mean = total / n
    # Equal activations have no spread, though their mean may be off by a rounding.
    std = float(activations.std()) if most > least else 0.0
    entropy = 0.0
    if total > 0:
        shares = activations[activations > 0] / total
        # With a single activation above 0 the sum is −0.
        entropy = abs(float(shares @ np.log2(shares)))
    return {
        "sum": total,
        "min": least,
        "max": most,
        "mean": mean,
        "std": std,
        "active": float((np.abs(activations) > ACTIVE).mean()),
        "n": n,
        "entropy": entropy,
        "entropy_norm": entropy / math.log2(n) if n > 1 else None,
        "zd": float(((activations - mean) / std > 1).mean()) if std > 0 else 0.0,
    }


def _figures(name: str, imatrix: Imatrix) -> TensorStatistics:
    entry = imatrix.entries[name]
    layer, kind = imatrix_place(name)
    return TensorStatistics(
        tensor=name,
        layer=layer,
        kind=kind,
        **activation_figures(mean_activations(entry).reshape(-1)),  # type: ignore[arg-type]
        cossim=_cossim(name, imatrix),
        experts=len(entry.counts),
        unreached=int((entry.counts <= 0).sum()),
    )


def _cossim(name: str, imatrix: Imatrix) -> float | None:
    previous = imatrix.entries.get(in_previous_block(name) or "")
    if previous is None or not (previous.counts > 0).any():
        return None
    # The sums and not the means, as in llama-imatrix: an expert weighs by the tokens that it saw.
    return cosine(*(entry.sums.astype(np.float64).reshape(-1) for entry in (imatrix.entries[name], previous)))


def by_layer(tensors: Iterable[TensorStatistics]) -> list[GroupStatistics]:
    """The averages of each block. What lies outside of blocks is the last group, with `layer` None."""
    groups: dict[int | None, list[TensorStatistics]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.layer, []).append(tensor)
    numbers = sorted(groups, key=lambda layer: (layer is None, layer))
    return [_averages(groups[number], number, None) for number in numbers]


def by_kind(tensors: Iterable[TensorStatistics]) -> list[GroupStatistics]:
    """The averages of each kind, sorted by name."""
    groups: dict[str, list[TensorStatistics]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.kind, []).append(tensor)
    return [_averages(groups[kind], None, kind) for kind in sorted(groups)]


def weighted_mean(pairs: Iterable[tuple[int, float | None]]) -> float | None:
    """Σ N·x / Σ N over the pairs (N, x) that have an x; None if no pair has one.

    Example:
        >>> weighted_mean([(3, 1.0), (1, 5.0), (9, None)])
        2.0
    """
    present = [(n, value) for n, value in pairs if value is not None]
    return sum(n * value for n, value in present) / sum(n for n, _ in present) if present else None


def _averages(members: list[TensorStatistics], layer: int | None, kind: str | None) -> GroupStatistics:
    return GroupStatistics(
        layer=layer,
        kind=kind,
        tensors=len(members),
        sum=weighted_mean((t.n, t.sum) for t in members),
        active=weighted_mean((t.n, t.active) for t in members),
        n=sum(t.n for t in members),
        entropy_norm=weighted_mean((t.n, t.entropy_norm) for t in members),
        zd=weighted_mean((t.n, t.zd) for t in members),
        cossim=weighted_mean((t.n, t.cossim) for t in members),
    )


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
