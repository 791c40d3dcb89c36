"""The state of a run for those who watch it: the step, the time left, and the best so far of each rung.

How long a run will still take follows from how long its work has taken so far. Each step has parts, each part an amount
of work on one scale: seconds of a reference core, by the formulas of `cost`. How long a part of a kind really takes is
learnt from parts of that kind that were done. Until there is one, it follows from all others, and is uncertain.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from bitladder.ladder.steps.step import Part
from bitladder.progress import Bar, Progress

# An estimate is given once this share of the time is over. Before that too little was seen.
TOLD_AFTER = 0.1
# The rate of a kind of which no part was done differs from the mean rate of the others by this factor at most, in the
# runs that were recorded.
SPREAD = 2.5
# An estimate is one number if the truth lies within this factor of it; else it is a range.
CLOSE = 1.5


@dataclasses.dataclass(frozen=True)
class TimeLeft:
    """The time left.

    Parameters:
        least: seconds.
        most: seconds.
    """

    least: float
    most: float

    @property
    def seconds(self) -> float | None:
        """The time left as one number, or None if least and most are too far apart for one."""
        return math.sqrt(self.least * self.most) if self.most <= CLOSE**2 * self.least else None


class Pace:
    """Times of the parts of steps. The clock is the caller's, in seconds.

    Parameters:
        parts: the parts of each step, by its name.
    """

    def __init__(self, parts: Mapping[str, Sequence[Part]]) -> None:
        self._left = {step: list(of_step) for step, of_step in parts.items()}
        self._seen: dict[str, tuple[float, float]] = {}  # kind → amount done, seconds
        self._spent = 0.0  # seconds of work
        self._step, self._from = "", tuple[str, ...]()
        self._began = 0.0
        self._part: Part | None = None
        self._share = 0.0

    def keep(self, steps: Container[str]) -> None:
        """Only these steps will be made."""
        self._left = {step: parts for step, parts in self._left.items() if step in steps}

    def begin(self, step: str, now: float) -> None:
        """A step begins.

        Which of two steps of a kind does the work may not be known before, such as whether the original model or the
        smoothed one is priced. So a step without parts takes those that another one of its kind has.
        """
        self._step, self._began = step, now
        alike = (other for other in self._left if other.split()[0] == step.split(maxsplit=1)[0])
        self._from = (step,) if self._left.get(step) else tuple(alike)
        self._part, self._share = None, 0.0

    def bar(self, label: str, now: float) -> None:
        """A progress bar of the step begins. The part that it stands for begins too, and the one before is over."""
        for step in self._from:
            for index, part in enumerate(self._left.get(step, [])):
                if part.bar in label.lower():
                    self._finish_part(now)
                    self._part, self._share, self._began = self._left[step].pop(index), 0.0, now
                    return

    def advance(self, share: float) -> None:
        """The part under way is done to this share (0 … 1), which goes up only."""
        self._share = min(1.0, max(share, self._share))

    def end(self, now: float, *, made: bool) -> None:
        """The step is over. `made` is False if it was complete from before, which tells nothing of time."""
        if made:
            self._finish_part(now)
        self._left.pop(self._step, None)
        self._part = None

    def left(self, now: float) -> TimeLeft | None:
        """The time until the last step is done; None until a tenth of the time is over."""
        seen, known, unseen = dict(self._seen), 0.0, 0.0
        spent = self._spent
        if self._part is not None:
            elapsed = now - self._began
            spent += elapsed
            if self._share > 0:
                done = self._part.amount * self._share
                _add(seen, self._part.kind, done, elapsed)
                known += (self._part.amount - done) * elapsed / done
        amount, seconds = (sum(kind[place] for kind in seen.values()) for place in (0, 1))
        if not amount:
            return None
        rates = {kind: of_kind[1] / of_kind[0] for kind, of_kind in seen.items() if of_kind[0]}
        begun = 0.0  # the expected time of a part that has not told how far it is, and that of a kind not seen
        if self._part is not None and not self._share:
            if self._part.kind in rates:
                known += max(self._part.amount * rates[self._part.kind] - (now - self._began), 0.0)
            else:
                begun = self._part.amount * seconds / amount
        for part in (part for parts in self._left.values() for part in parts):
            if part.kind in rates:
                known += part.amount * rates[part.kind]
            else:
                unseen += part.amount * seconds / amount
        elapsed = now - self._began

        def total(factor: float) -> float:
            return known + unseen * factor + max(begun * factor - elapsed, 0.0)

        return TimeLeft(total(1 / SPREAD), total(SPREAD)) if spent >= TOLD_AFTER * (spent + total(1)) else None

    def _finish_part(self, now: float) -> None:
        if self._part is not None:
            _add(self._seen, self._part.kind, self._part.amount, now - self._began)
            self._spent += now - self._began
        self._part = None


def _add(seen: dict[str, tuple[float, float]], kind: str, amount: float, seconds: float) -> None:
    before = seen.get(kind, (0.0, 0.0))
    seen[kind] = (before[0] + amount, before[1] + seconds)


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
        progress: gets all bars and remarks. It can be read.
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
        self.progress, self._watch, self._clock = progress, watch, clock
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
            with self.progress.task(label, total) as task:
                yield _Counted(task, total, self._advance if self._depth == 1 else None)
        finally:
            self._depth -= 1

    def info(self, text: str) -> None:
        """Passes a remark on."""
        self.progress.info(text)

    def warn(self, text: str) -> None:
        """Passes a warning on."""
        self.progress.warn(text)

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
