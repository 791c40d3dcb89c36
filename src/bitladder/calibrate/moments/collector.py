"""The observer that adds up second moments, alone or beside an importance matrix."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import ImatrixCollector
from bitladder.calibrate.inputs import Experts, Floats, WeightInput, refuse_not_finite
from bitladder.calibrate.moments.entries import EntryPart
from bitladder.calibrate.moments.sums import MomentSums, WeightedSums, add_tokens
from bitladder.engine import Multiplication
from bitladder.errors import BitladderError


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
    """Adds up the inputs of some parts. `begin` says before each computation which tokens come."""

    def __init__(self, parts: Sequence[EntryPart]) -> None:
        self.parts = [PartSums(part) for part in parts]
        self._watched: dict[str, _WatchedInput] = {}
        for leader, shared in {part.entry.input.leader: part.entry.input for part in parts}.items():
            grown = [sums for sums in self.parts if sums.part.entry.input == shared]
            self._watched[leader] = _watched(shared, grown)
        self._waiting: set[str] = set()
        self._first, self._count = 0, 0

    def begin(self, chunk: int, first: int, count: int) -> None:
        """See `ChunkObserver.begin`."""
        self._waiting = set(self._watched)
        self._first, self._count = first, count

    def wants(self, seen: Multiplication) -> bool:
        """Whether this is the first weight of an input that is collected."""
        return seen.weight in self._waiting

    def satisfied(self) -> bool:
        """Whether all inputs were seen in this computation."""
        return not self._waiting

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Adds these inputs."""
        self._waiting.discard(seen.weight)
        watched = self._watched[seen.weight]
        tokens = inputs.shape[1] if experts is None else len(experts)
        if watched.rest is not None and tokens != self._count:
            raise BitladderError(
                f"{seen.weight} sees {tokens} of {self._count} tokens, so their positions are not known; "
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
            add_tokens(rows if not rest.any() else rows[~rest], rows[rest], targets)


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


class MomentsAndImatrix:
    """A MomentCollector, and an ImatrixCollector that sees the same multiplications."""

    def __init__(self, moments: MomentCollector, imatrix: ImatrixCollector) -> None:
        self._moments, self._imatrix = moments, imatrix
        self._waiting: set[str] = set()

    def begin(self, chunk: int, first: int, count: int) -> None:
        """See `ChunkObserver.begin`."""
        self._moments.begin(chunk, first, count)
        self._waiting = set(self._imatrix.entries)

    def wants(self, seen: Multiplication) -> bool:
        """Whether one of the two wants this input."""
        imatrix = self._imatrix.wants(seen)
        if not imatrix:
            self._waiting.discard(seen.weight)
        return self._moments.wants(seen) or imatrix

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Shows the input to those that want it."""
        self._waiting.discard(seen.weight)
        if self._moments.wants(seen):
            self._moments.see(seen, inputs, experts)
        if self._imatrix.wants(seen):
            self._imatrix.see(seen, inputs, experts)

    def satisfied(self) -> bool:
        """Whether both have seen all they wait for in this computation."""
        return not self._waiting and self._moments.satisfied()
