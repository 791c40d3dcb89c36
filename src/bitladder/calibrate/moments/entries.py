"""What is kept apart: an entry for each input and weighting of its tokens, and the parts of entries that fit a pass."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.inputs import Floats, WeightInput
from bitladder.calibrate.moments.sums import sums_bytes
from bitladder.errors import BitladderError


@dataclasses.dataclass(frozen=True)
class MomentEntry:
    """Weights with one input whose tokens count alike.

    Parameters:
        names: the weights. The entry is kept under the first name.
        input: their input.
        profile: what the token at each position counts, float32 [n_ctx], mean 1; None counts 1 each.
    """

    names: tuple[str, ...]
    input: WeightInput
    profile: Floats | None

    @property
    def name(self) -> str:
        """The weight under whose name it is kept."""
        return self.names[0]


@dataclasses.dataclass(frozen=True)
class EntryPart:
    """The matrices start … stop−1 of an entry, as many as one pass collects."""

    entry: MomentEntry
    start: int
    stop: int

    @property
    def label(self) -> str:
        """Its name among parts."""
        return f"{self.entry.name}.{self.start}-{self.stop}"


def make_entries(
    inputs: Sequence[WeightInput], weights: Mapping[str, npt.NDArray[np.floating]], n_ctx: int
) -> list[MomentEntry]:
    """The entries of some inputs.

    Parameters:
        inputs: inputs of weights.
        weights: what the token at each position counts for a weight, float [n_ctx]. The tokens of a weight that is
            not in it count alike.
        n_ctx: tokens of a chunk.

    Raises:
        BitladderError: weights of tokens are negative, not finite or all zero.
    """
    entries = []
    for shared in inputs:
        groups: dict[bytes, tuple[list[str], Floats | None]] = {}
        for name in shared.names:
            profile = _profile(name, weights[name], n_ctx) if name in weights else None
            key = b"" if profile is None else profile.tobytes()
            groups.setdefault(key, ([], profile))[0].append(name)
        entries += [MomentEntry(tuple(names), shared, profile) for names, profile in groups.values()]
    return entries


def _profile(name: str, weights: npt.NDArray[np.floating], n_ctx: int) -> Floats | None:
    """Weights with mean 1, or None if all are the same."""
    if weights.shape != (n_ctx,):
        raise BitladderError(f"weights of tokens for {name} have the shape {weights.shape}, not {(n_ctx,)}")
    mean = float(weights.mean(dtype=np.float64))
    if not (np.isfinite(mean) and mean > 0 and weights.min() >= 0):
        raise BitladderError(f"weights of tokens for {name} should be finite, none negative and not all zero")
    return None if weights.min() == weights.max() else (weights / mean).astype(np.float32)


def plan_passes(entries: Sequence[MomentEntry], memory: int) -> list[list[EntryPart]]:
    """The parts of each pass: the sums of one pass fit into `memory` bytes, or are of a single matrix.

    Example:
        >>> experts = MomentEntry(("blk.0.ffn_up_exps.weight",), WeightInput(("x",), 64, 8, True), None)
        >>> [[(part.start, part.stop) for part in parts] for parts in plan_passes([experts], 3 * sums_bytes(64))]
        [[(0, 3)], [(3, 6)], [(6, 8)]]
    """
    passes: list[list[EntryPart]] = []
    room = 0
    for entry in entries:
        size = sums_bytes(entry.input.width)
        start = 0
        while start < entry.input.matrices:
            if not passes or (room < size and passes[-1]):
                passes.append([])
                room = memory
            count = min(max(room // size, 1), entry.input.matrices - start)
            passes[-1].append(EntryPart(entry, start, start + count))
            room -= count * size
            start += count
    return passes
