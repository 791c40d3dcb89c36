"""Entries of moments, the parts of them that fit into memory, and the observers that add them up."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import ImatrixSums, Squares
from bitladder.calibrate.inputs import Experts, Floats, WeightInput, refuse_not_finite
from bitladder.calibrate.moments.triangles import MomentSums, WeightedSums, add_tokens, sums_bytes
from bitladder.engine import Multiplication
from bitladder.errors import BitladderError
from bitladder.units import number_of


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


class PartSums:
    """The sums and counts of a part while they grow."""

    def __init__(self, part: EntryPart) -> None:
        self.part = part
        self.sums = [MomentSums(part.entry.input.width) for _ in range(part.start, part.stop)]
        self.counts = np.zeros(part.stop - part.start, np.int64)

    def state(self) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """The arrays that grow, by name."""
        yield f"{self.part.label} counts", self.counts
        for index, sums in enumerate(self.sums):
            for number, panel in enumerate(sums.panels):
                yield f"{self.part.label} {index} {number}", panel

    @property
    def matrices(self) -> range:
        """Numbers of the matrices."""
        return range(self.part.start, self.part.stop)

    def of_matrix(self, matrix: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of one matrix that grow, by name."""
        index = matrix - self.part.start
        panels = {f"panel {number}": panel for number, panel in enumerate(self.sums[index].panels)}
        return {"count": self.counts[index : index + 1], **panels}

    def packed(self) -> Iterator[Floats]:
        """The mean of each matrix, packed."""
        for sums, count in zip(self.sums, self.counts, strict=True):
            yield sums.packed(int(count))


@dataclasses.dataclass(frozen=True)
class _WatchedInput:
    """An input and the parts that grow by it.

    Parameters:
        input: the input.
        parts: the parts.
        common: what most tokens count for each part.
        rest: positions whose tokens count something else for some part, bool [n_ctx]; None if there are none.
    """

    input: WeightInput
    parts: list[PartSums]
    common: list[float]
    rest: npt.NDArray[np.bool_] | None


class MomentCollector:
    """The parts that are collected. Its observers are shown the inputs.

    Parameters:
        parts: the parts.
        pool: threads that add (`add_tokens`); None adds in the thread that decodes.
    """

    def __init__(self, parts: Sequence[EntryPart], pool: Executor | None = None) -> None:
        self.pool = pool
        self.parts = [PartSums(part) for part in parts]
        self.watched: dict[str, _WatchedInput] = {}
        for leader, shared in {part.entry.input.leader: part.entry.input for part in parts}.items():
            grown = [sums for sums in self.parts if sums.part.entry.input == shared]
            self.watched[leader] = _watched(shared, grown)

    def observer(self) -> "MomentObserver":
        """An observer that adds to the parts. Only one at a time may see an input."""
        return MomentObserver(self)


class MomentObserver:
    """Adds up the inputs of a collector's parts. `begin` says before each computation which tokens come."""

    def __init__(self, collector: MomentCollector) -> None:
        self._collector = collector
        self._waiting: set[str] = set()
        self._first, self._count = 0, 0

    def begin(self, first: int, count: int) -> None:
        """See `ChunkObserver.begin`."""
        self._waiting = set(self._collector.watched)
        self._first, self._count = first, count

    def wants(self, seen: Multiplication) -> bool:
        """Whether this is the first weight of an input that is collected."""
        return seen.weight in self._waiting

    def satisfied(self) -> bool:
        """Whether all inputs were seen in this computation."""
        return not self._waiting

    def take(self) -> None:
        """All is in the parts."""

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Adds these inputs."""
        self._waiting.discard(seen.weight)
        watched = self._collector.watched[seen.weight]
        tokens = inputs.shape[1] if experts is None else len(experts)
        if watched.rest is not None and tokens != self._count:
            raise BitladderError(
                f"{seen.weight} sees {tokens} of {number_of(self._count, 'token')}, so their positions are not known; "
                "use --weighting tokens"
            )
        refuse_not_finite(seen, inputs)
        if experts is None:
            for index, rows in enumerate(inputs):
                self._add(watched, index % watched.input.matrices, rows, np.arange(tokens))
            return
        for expert in np.unique(experts):
            where, slots = np.nonzero(experts == expert)
            rows = inputs[where, slots % inputs.shape[1]]
            self._add(watched, int(expert), rows, where)

    def _add(self, watched: _WatchedInput, matrix: int, rows: Floats, tokens: npt.NDArray[np.intp]) -> None:
        positions = self._first + tokens
        rest = np.zeros(len(tokens), np.bool_) if watched.rest is None else watched.rest[positions]
        targets = []
        for sums, common in zip(watched.parts, watched.common, strict=True):
            part = sums.part
            if not part.start <= matrix < part.stop:
                continue
            profile = part.entry.profile
            others = np.ones(int(rest.sum()), np.float32) if profile is None else profile[positions][rest]
            targets.append(WeightedSums(sums.sums[matrix - part.start], common, others))
            sums.counts[matrix - part.start] += len(rows)
        if targets:
            add_tokens(rows if not rest.any() else rows[~rest], rows[rest], targets, self._collector.pool)


def _watched(shared: WeightInput, parts: list[PartSums]) -> _WatchedInput:
    """What most tokens count for each part, and where tokens are that count something else for any of them."""
    common: list[float] = []
    rest: npt.NDArray[Any] = np.zeros((), np.bool_)
    for sums in parts:
        profile = sums.part.entry.profile
        if profile is None:
            common.append(1.0)
            continue
        values, counts = np.unique(profile, return_counts=True)
        usual = values[counts.argmax()]
        common.append(float(usual))
        rest = rest | (profile != usual)
    return _WatchedInput(shared, parts, common, rest if rest.ndim else None)


class MomentsAndSquares:
    """A MomentObserver, and an observer of squares that sees the same multiplications."""

    def __init__(self, moments: MomentObserver, imatrix: ImatrixSums) -> None:
        self._moments, self._squares, self._weights = moments, imatrix.observer(), imatrix.entries
        self._waiting: set[str] = set()

    def begin(self, first: int, count: int) -> None:
        """See `ChunkObserver.begin`."""
        self._moments.begin(first, count)
        self._waiting = set(self._weights)

    def wants(self, seen: Multiplication) -> bool:
        """Whether one of the two wants this input."""
        squares = self._squares.wants(seen)
        if not squares:
            self._waiting.discard(seen.weight)
        return self._moments.wants(seen) or squares

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Shows the input to those that want it."""
        self._waiting.discard(seen.weight)
        if self._moments.wants(seen):
            self._moments.see(seen, inputs, experts)
        if self._squares.wants(seen):
            self._squares.see(seen, inputs, experts)

    def satisfied(self) -> bool:
        """Whether both have seen all they wait for in this computation."""
        return not self._waiting and self._moments.satisfied()

    def take(self) -> list[Squares]:
        """The squares of the chunk."""
        return self._squares.take()
