"""Averages over the tensors of a layer, or of a kind, weighted by N.

Definitions: llama.cpp, tools/imatrix/imatrix.cpp (the second table of --show-statistics). There a tensor without a
CosSim counts as 0; here it does not take part in that average.
"""

import dataclasses
from collections.abc import Iterable

from bitladder.calibrate.statistics.figures import TensorStatistics


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """A layer (`kind` None) or a kind (`layer` None) of `tensors` weights with `n` entries together.

    The others are averages weighted by N, in the units of TensorStatistics; None where no tensor has a value.
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


def by_layer(tensors: Iterable[TensorStatistics]) -> list[GroupStatistics]:
    """A row for each block; what lies outside of blocks is the last, with `layer` None."""
    groups: dict[int | None, list[TensorStatistics]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.layer, []).append(tensor)
    numbers = sorted(groups, key=lambda layer: (layer is None, layer))
    return [_group(groups[number], number, None) for number in numbers]


def by_kind(tensors: Iterable[TensorStatistics]) -> list[GroupStatistics]:
    """A row for each kind, by name."""
    groups: dict[str, list[TensorStatistics]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.kind, []).append(tensor)
    return [_group(groups[kind], None, kind) for kind in sorted(groups)]


def weighted_mean(pairs: Iterable[tuple[int, float | None]]) -> float | None:
    """Σ N·x / Σ N over the pairs (N, x) that have an x; None if there is none."""
    present = [(n, value) for n, value in pairs if value is not None]
    return sum(n * value for n, value in present) / sum(n for n, _ in present) if present else None


def _group(members: list[TensorStatistics], layer: int | None, kind: str | None) -> GroupStatistics:
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
