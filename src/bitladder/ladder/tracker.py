"""What a run is doing, for whoever watches: the step, the time left, and the best so far of each rung."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitladder.ladder.pace import Pace
from bitladder.progress import Bar, Progress


@dataclasses.dataclass(frozen=True)
class Best:
    """The best that there is of a rung so far.

    `name` says how its types were chosen, if there is a choice; `kld` is its mean KLD in nats per token, `error` the ±.
    """

    name: str
    bytes: int
    kld: float
    error: float


@dataclasses.dataclass(frozen=True)
class Status:
    """A moment of a run: step `number` of `count`, by its name, and the best so far by rung.

    `working` says that there was something to do in this step; what is complete from before passes without.
    """

    step: str
    number: int
    count: int
    seconds_left: float | None
    working: bool
    rungs: tuple[str, ...]
    best: Mapping[str, Best]


Watch = Callable[[Status], None]


class Tracker:
    """A Progress that hands on to another one, and tells `watch` of steps and their advance."""

    def __init__(
        self,
        pace: Pace,
        count: int,
        rungs: tuple[str, ...],
        progress: Progress,
        watch: Watch | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace, self._count, self._rungs = pace, count, rungs
        self._progress, self._watch, self._clock = progress, watch, clock
        self._step, self._number = "", 0
        self._best: dict[str, Best] = {}
        self._depth = 0
        self._working = False

    @contextlib.contextmanager
    def step(self, name: str, made: Callable[[], bool]) -> Iterator[None]:
        """A step is under way; `made` says afterwards whether it was really done."""
        self._step, self._number, self._working = name, self._number + 1, False
        self._pace.begin(name, self._clock())
        self._tell()
        yield
        self._pace.end(self._clock(), made=made())
        self._tell()

    def rung_tried(self, rung: str, best: Best) -> None:
        """A candidate of a rung was measured: told if it is the first, or has less KLD than the best so far."""
        if rung not in self._best or best.kld < self._best[rung].kld:
            self._best[rung] = best
            self._tell()

    def rung_scored(self, rung: str, scores: Mapping[str, Any], name: str = "") -> None:
        """As `rung_tried`, from a Scores JSON."""
        if kld := scores.get("kld"):
            self.rung_tried(rung, Best(name, scores["bytes"], kld["value"], kld["error"]))

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """A piece of work. The outermost one stands for a part of the step."""
        self._depth += 1
        if self._depth == 1:
            self._pace.bar(label, self._clock())
        if not self._working:
            self._working = True
            self._tell()
        try:
            with self._progress.task(label, total) as task:
                yield _Counted(task, total, self._advance if self._depth == 1 else None)
        finally:
            self._depth -= 1

    def info(self, text: str) -> None:
        """Handed on."""
        self._progress.info(text)

    def warn(self, text: str) -> None:
        """Handed on."""
        self._progress.warn(text)

    def _advance(self, share: float) -> None:
        self._pace.advance(share)
        self._tell()

    def _tell(self) -> None:
        if self._watch is not None:
            left = self._pace.left(self._clock())
            self._watch(
                Status(self._step, self._number, self._count, left, self._working, self._rungs, dict(self._best))
            )


class _Counted:
    def __init__(self, task: Bar, total: float, advance: Callable[[float], None] | None) -> None:
        self._task, self._total, self._advance, self._done = task, total, advance, 0.0

    def advance(self, amount: float = 1) -> None:
        self._task.advance(amount)
        self._done += amount
        if self._advance is not None and self._total:
            self._advance(self._done / self._total)

    def note(self, text: str) -> None:
        self._task.note(text)
