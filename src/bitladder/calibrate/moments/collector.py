"""The observer that adds up second moments, and the decoding that feeds it, one chunk at a time."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import Collector
from bitladder.calibrate.inputs import Input
from bitladder.calibrate.moments.entries import Part
from bitladder.calibrate.moments.moments_file import Floats
from bitladder.calibrate.moments.sums import Sums, Weighted, add
from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model, Tokens
from bitladder.engine.observe import Multiplication, SatisfiedObserver, WatchingUntilSatisfied
from bitladder.errors import BitladderError
from bitladder.gguf.names import in_main_block

Experts = npt.NDArray[np.int32]


class Adding:
    """The sums and counts of a part while they grow."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.sums = [Sums(part.entry.input.width) for _ in range(part.start, part.stop)]
        self.counts = np.zeros(part.stop - part.start, np.int64)

    def state(self) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """The arrays that grow, by name."""
        yield f"{self.part.label} counts", self.counts
        for index, sums in enumerate(self.sums):
            for number, panel in enumerate(sums.panels):
                yield f"{self.part.label} {index} {number}", panel

    def packed(self) -> Iterator[Floats]:
        """The mean of each matrix."""
        for sums, count in zip(self.sums, self.counts, strict=True):
            yield sums.packed(int(count))


@dataclasses.dataclass(frozen=True)
class _Watched:
    """An input with the parts that grow by it. `rest` marks positions [n_ctx] (or [chunks, n_ctx]) whose tokens some
    part counts differently from its other tokens; None if there are none."""

    input: Input
    adding: list[Adding]
    rest: npt.NDArray[np.bool_] | None
    common: list[float]


class MomentCollector:
    """Adds up the inputs of some parts. `begin` says before each decode which tokens come."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.adding = [Adding(part) for part in parts]
        self._watched: dict[str, _Watched] = {}
        for one in {part.entry.input.leader: part.entry.input for part in parts}.values():
            self._watched[one.leader] = _watched(one, [a for a in self.adding if a.part.entry.input == one])
        self._left: set[str] = set()
        self._chunk, self._first, self._count = 0, 0, 0

    def begin(self, chunk: int, first: int, count: int) -> None:
        """The next computation has the tokens first … first+count−1 of a chunk, in order."""
        self._left = set(self._watched)
        self._chunk, self._first, self._count = chunk, first, count

    def wants(self, seen: Multiplication) -> bool:
        """The first weight of each input that is collected."""
        return seen.weight in self._left

    def satisfied(self) -> bool:
        """Whether all of them were seen in this computation."""
        return not self._left

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Add these inputs."""
        self._left.discard(seen.weight)
        watched = self._watched[seen.weight]
        tokens = inputs.shape[1] if experts is None else len(experts)
        if watched.rest is not None and tokens != self._count:
            raise BitladderError(
                f"{seen.weight} sees {tokens} of {self._count} tokens, so their positions are not known; "
                "use --weighting tokens"
            )
        if not np.isfinite(inputs).all():
            raise BitladderError(
                f"the input of {seen.weight} has values that are not finite: the model is damaged or overflows F16; "
                "convert it with --outtype bf16 or f32"
            )
        if experts is None:
            for index, rows in enumerate(inputs):
                self._add(watched, index % watched.input.matrices, rows, np.arange(tokens))
            return
        for expert in np.unique(experts):
            where, slots = np.nonzero(experts == expert)
            rows = inputs[where, slots % inputs.shape[1]]
            self._add(watched, int(expert), rows, where)

    def _add(self, watched: _Watched, matrix: int, rows: Floats, tokens: npt.NDArray[np.intp]) -> None:
        chosen = [
            (adding, common)
            for adding, common in zip(watched.adding, watched.common, strict=True)
            if adding.part.start <= matrix < adding.part.stop
        ]
        rest = np.zeros(len(tokens), np.bool_) if watched.rest is None else self._at(watched.rest, tokens)
        targets = []
        for adding, common in chosen:
            index = matrix - adding.part.start
            profile = adding.part.entry.profile
            own = self._at(profile, tokens)[rest] if profile is not None else np.ones(int(rest.sum()), np.float32)
            targets.append(Weighted(adding.sums[index], common, own))
            adding.counts[index] += len(rows)
        if targets:
            add(rows if not rest.any() else rows[~rest], rows[rest], targets)

    def _at(self, profile: npt.NDArray[Any], tokens: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """Of a profile by position, or by chunk and position: the values at these tokens of the computation."""
        row = profile if profile.ndim == 1 else profile[self._chunk]
        return row[self._first + tokens]


def _watched(one: Input, adding: list[Adding]) -> _Watched:
    """What most tokens count for each part, and where tokens are that count differently for any of them."""
    profiles = [a.part.entry.profile for a in adding]
    common, rest = [], np.zeros((), np.bool_)
    for profile in profiles:
        if profile is None:
            common.append(1.0)
            continue
        values, counts = np.unique(profile, return_counts=True)
        usual = values[counts.argmax()]
        common.append(float(usual))
        rest = rest | (profile != usual)
    return _Watched(one, adding, rest if rest.ndim else None, common)


class WithImatrix:
    """A MomentCollector, and the collector of an importance matrix that sees the same multiplications."""

    def __init__(self, moments: MomentCollector, imatrix: Collector, inputs: Sequence[Input]) -> None:
        self.imatrix = imatrix
        self._moments = moments
        names = (name for one in inputs for name in one.names)
        self._names = {name for name in names if in_main_block(name) or imatrix.process_output}
        self._names.discard("token_embd.weight")
        self._left: set[str] = set()

    def begin(self, chunk: int, first: int, count: int) -> None:
        """As MomentCollector.begin."""
        self._moments.begin(chunk, first, count)
        self._left = set(self._names)

    def wants(self, seen: Multiplication) -> bool:
        """Whatever one of the two wants."""
        mine = self._moments.wants(seen)
        wanted = self.imatrix.wants(seen)
        if not wanted:
            self._left.discard(seen.weight)
        return mine or wanted

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Show it to those who want it."""
        self._left.discard(seen.weight)
        if self._moments.wants(seen):
            self._moments.see(seen, inputs, experts)
        if self.imatrix.wants(seen):
            self.imatrix.see(seen, inputs, experts)

    def satisfied(self) -> bool:
        """Whether both are."""
        return not self._left and self._moments.satisfied()


class Beginning(SatisfiedObserver, Protocol):
    """An observer that is told which tokens come."""

    def begin(self, chunk: int, first: int, count: int) -> None:
        """See MomentCollector.begin."""


def decode_chunks(
    model: Model,
    chunks: Tokens,
    observer: Beginning,
    *,
    done: int = 0,
    n_ubatch: int = 512,
    threads: int | None = None,
) -> Iterator[int]:
    """Decode chunks, int32 [chunks, n_ctx], from chunk `done` on, each by itself; yield how many are done.

    Each computation ends with the last input that the observer waits for.
    """
    n_ctx = chunks.shape[1]
    step = min(n_ubatch, n_ctx)
    decoding = Decoding(n_ctx=n_ctx, n_batch=step, n_ubatch=step, threads=threads)
    with Context(model, decoding, callback=WatchingUntilSatisfied(observer)) as context:
        for index in range(done, len(chunks)):
            context.clear()
            for first in range(0, n_ctx, step):
                piece = chunks[index, first : first + step]
                observer.begin(index, first, len(piece))
                # All tokens must be outputs: the last block drops the others early.
                context.decode(
                    piece,
                    np.arange(first, first + len(piece), dtype=np.int32),
                    np.zeros(len(piece), np.int32),
                    np.ones(len(piece), np.bool_),
                )
            yield index + 1
