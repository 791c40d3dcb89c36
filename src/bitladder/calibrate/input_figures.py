"""Figures of weights' inputs, and their averages over the tensors of a layer or of a kind.

All are taken over a_j = Σx²/count, the mean squared input of column j of each expert that a token reached. Sums are
float64. Definitions: llama.cpp, tools/imatrix/imatrix.cpp (--show-statistics), which sums in float32. Its averages
count a tensor without a CosSim as 0; here such a tensor does not take part in that average.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry
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
