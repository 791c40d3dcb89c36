"""Who is best at equal size: by the paired difference of KLD, as far as noise lets two files be told apart."""

import dataclasses
from collections.abc import Sequence

from bitladder.evaluate import Figure, Measured, compare_pair

# Files within this share of each other's size count as equally large.
TOLERANCE = 0.01
# Differences under so many standard errors are not called differences.
SURE = 2.0


@dataclasses.dataclass(frozen=True)
class Beaten:
    """A file that another one beats, which is no larger: by its index, and how much more KLD (nats per token) and how
    many more bytes this one has.
    """

    by: int
    kld: Figure
    bytes: int


@dataclasses.dataclass(frozen=True)
class Level:
    """Files of equal size, by index, from the least KLD up. `sure` says that the first differs from the second by more
    than noise; `gaps` are the others' KLDs less the first's, nats per token.
    """

    members: tuple[int, ...]
    sure: bool
    gaps: tuple[Figure, ...]


def beaten(models: Sequence[Measured], tolerance: float = TOLERANCE) -> list[Beaten | None]:
    """For each model the one that beats it most among those of its size or smaller; None if there is none."""
    found: list[Beaten | None] = []
    for one in models:
        rivals = [
            Beaten(index, gap, one.scores.bytes - other.scores.bytes)
            for index, other in enumerate(models)
            if other is not one and other.scores.bytes <= one.scores.bytes * (1 + tolerance)
            if (gap := kld_gap(one, other)) is not None and gap.value > SURE * gap.error
        ]
        found.append(max(rivals, key=lambda rival: rival.kld.value, default=None))
    return found


def levels(models: Sequence[Measured], tolerance: float = TOLERANCE) -> list[Level]:
    """Groups of two and more files of equal size, from the smallest up."""
    order = sorted((i for i, one in enumerate(models) if one.scores.kld), key=lambda i: models[i].scores.bytes)
    groups: list[list[int]] = []
    for index in order:
        if groups and models[index].scores.bytes <= models[groups[-1][0]].scores.bytes * (1 + tolerance):
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_level(models, group) for group in groups if len(group) > 1]


def kld_gap(this: Measured, other: Measured) -> Figure | None:
    """KLD of this less the other's, paired token by token, nats per token; None if one has none."""
    return compare_pair(this, other).kld


def _level(models: Sequence[Measured], group: list[int]) -> Level:
    ranked = sorted(group, key=lambda i: models[i].scores.kld.value)  # type: ignore[union-attr]  # all have one
    gaps = [kld_gap(models[i], models[ranked[0]]) for i in ranked[1:]]
    known = tuple(gap for gap in gaps if gap is not None)
    return Level(tuple(ranked), known[0].value > SURE * known[0].error, known)
