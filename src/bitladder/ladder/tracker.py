"""The state of a run for those who watch it: the step, the time left, and the best so far of each rung."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitladder.ladder.pace import Pace, TimeLeft
from bitladder.progress import Bar, Progress


@dataclasses.dataclass(frozen=True)
class Best:
    """The best recipe or file of a rung so far.

    Parameters:
        name: how its types were chosen, or empty.
        bytes: size of the file.
        kld: mean KLD, nats per token.
        error: standard error of `kld`.
    """

    name: str
    bytes: int
    kld: float
    error: float


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a run.

    Parameters:
        step: name of the step.
        number: number of the step, from 1 on.
        count: number of steps.
        left: estimate of the time left, or None.
        working: whether the step has work to do. A step that is complete has none.
        rungs: the rungs of the run.
        best: the best so far, by rung.
    """

    step: str
    number: int
    count: int
    left: TimeLeft | None
    working: bool
    rungs: tuple[str, ...]
    best: Mapping[str, Best]


Watch = Callable[[Status], None]


class Tracker:
    """A Progress that passes everything on to another one, and reports the state of the run.

    Parameters:
        pace: learns how long parts of steps take.
        count: number of steps.
        rungs: the rungs of the run.
        progress: gets all bars and remarks.
        watch: gets the state when it changes, or None.
        clock: the time in seconds.
    """

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
    def step(self, name: str, number: int, made: Callable[[], bool]) -> Iterator[None]:
        """The context of a step. `made` says at its end whether the step did any work. What is made again for a later
        step has the number of that step."""
        self._step, self._number, self._working = name, number, False
        self._pace.begin(name, self._clock())
        self._tell()
        yield
        self._pace.end(self._clock(), made=made())
        self._tell()

    def rung_tried(self, rung: str, best: Best) -> None:
        """Keeps the measured recipe or file of a rung if it has the least KLD so far."""
        if rung not in self._best or best.kld < self._best[rung].kld:
            self._best[rung] = best
            self._tell()

    def rung_scored(self, rung: str, scores: Mapping[str, Any], name: str = "") -> None:
        """The same as `rung_tried`, from a Scores JSON."""
        if kld := scores.get("kld"):
            self.rung_tried(rung, Best(name, scores["bytes"], kld["value"], kld["error"]))

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """A progress bar. The outermost bar is a part of the step."""
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
        """Passes a remark on."""
        self._progress.info(text)

    def warn(self, text: str) -> None:
        """Passes a warning on."""
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
