"""What is to be kept apart: inputs, where tokens weigh differently for some of their weights, and parts that fit."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.inputs import Input
from bitladder.calibrate.moments.moments_file import Floats
from bitladder.calibrate.moments.sums import sums_bytes
from bitladder.errors import BitladderError


@dataclasses.dataclass(frozen=True)
class Entry:
    """Weights with one input whose tokens count alike.

    `profile` says how much, float32 [n_ctx] or [chunks, n_ctx], mean 1; None: 1 each.
    """

    names: tuple[str, ...]
    input: Input
    profile: Floats | None

    @property
    def name(self) -> str:
        """The weight under whose name it is kept."""
        return self.names[0]


@dataclasses.dataclass(frozen=True)
class Part:
    """Matrices start … stop−1 of an entry, as many as are collected at once."""

    entry: Entry
    start: int
    stop: int

    @property
    def label(self) -> str:
        """Its name among parts."""
        return f"{self.entry.name}.{self.start}-{self.stop}"


def make_entries(
    inputs: Sequence[Input], weights: Mapping[str, npt.NDArray[np.floating]] | None, chunks: int, n_ctx: int
) -> list[Entry]:
    """The entries of some inputs. `weights` say how tokens count for a weight, [n_ctx] by position or [chunks, n_ctx];
    those without count tokens alike. Raises BitladderError for weights that are negative, not finite or all zero."""
    entries = []
    for one in inputs:
        groups: dict[bytes, tuple[list[str], Floats | None]] = {}
        for name in one.names:
            given = (weights or {}).get(name)
            profile = None if given is None else _profile(name, given, chunks, n_ctx)
            key = b"" if profile is None else profile.tobytes()
            groups.setdefault(key, ([], profile))[0].append(name)
        entries += [Entry(tuple(names), one, profile) for names, profile in groups.values()]
    return entries


def _profile(name: str, given: npt.NDArray[np.floating], chunks: int, n_ctx: int) -> Floats | None:
    """Weights with mean 1, or None if all are the same."""
    if given.shape not in ((n_ctx,), (chunks, n_ctx)):
        raise BitladderError(f"weights of tokens for {name} are {given.shape}, not {(n_ctx,)} or {(chunks, n_ctx)}")
    mean = float(given.mean(dtype=np.float64))
    if not (np.isfinite(mean) and mean > 0 and given.min() >= 0):
        raise BitladderError(f"weights of tokens for {name} should be finite, none negative and not all zero")
    return None if given.min() == given.max() else (given / mean).astype(np.float32)


def plan_passes(entries: Sequence[Entry], memory: int) -> list[list[Part]]:
    """Parts for one pass after the other, so that the sums of one fit into `memory` bytes (one matrix at least)."""
    passes: list[list[Part]] = []
    room = 0
    for entry in entries:
        size = sums_bytes(entry.input.width)
        start = 0
        while start < entry.input.matrices:
            if not passes or (room < size and passes[-1]):
                passes.append([])
                room = memory
            count = min(max(room // size, 1), entry.input.matrices - start)
            passes[-1].append(Part(entry, start, start + count))
            room -= count * size
            start += count
    return passes
