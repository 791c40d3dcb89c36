"""The steps of a run on several machines: each begins when what it reads is complete, wherever a machine is idle.

What one machine must do, such as timing, is done here while others work. Steps are recorded here, and only here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from bitladder.exchange import SharedFolder
from bitladder.ladder.context import Run
from bitladder.ladder.elsewhere import Done, RunState, read_by, state_of, work_on
from bitladder.ladder.model_shape import ModelShape
from bitladder.ladder.steps.step import Product, Step
from bitladder.machines import Machines, wait_for
from bitladder.progress import Progress
from bitladder.trial import Helpers
from bitladder.units import number_of

# What is done with a step when its turn has come: it gets the step, and what other machines have made of it.
Record = Callable[[Step, Product | None], None]


@dataclasses.dataclass
class _AtWork:
    """A step that other machines make."""

    step: Step
    state: RunState
    futures: list[Future[Done]]


class Spread:
    """Steps on several machines.

    Parameters:
        run: the run.
        machines: that do the work.
        shape: the matrices of the model.
        progress: where the wait is shown.
    """

    def __init__(self, run: Run, machines: Machines, shape: ModelShape, progress: Progress) -> None:
        self._run, self._machines, self._shape, self._progress = run, machines, shape, progress
        self._at_work: list[_AtWork] = []
        share = machines.share
        self._exchange = None if share is None else SharedFolder(share, run.store.folder)
        run.machines = (machines.count, machines.threads)
        run.helpers = self._helpers

    def make(self, steps: Sequence[Step], record: Record) -> None:
        """Makes the steps.

        Parameters:
            steps: all steps of the run, each after those that it reads.
            record: called for each step, in the order in which they are complete. It makes the step, if no other
                machine has, and keeps its record.

        Raises:
            BitladderError: of a step, or of the machines. No other step begins then.
        """
        left = list(steps)
        try:
            while left or self._at_work:
                if (step := self._startable(left)) is not None:
                    left.remove(step)
                    if step.anywhere and not self._run.complete(step):
                        self._begin(step)
                    else:
                        record(step, None)
                else:
                    self._finish(record)
        finally:
            for at_work in self._at_work:
                for future in at_work.futures:
                    future.cancel()

    def _startable(self, left: Sequence[Step]) -> Step | None:
        """The next step that can begin. Those for any machine come first, so that none waits for what is made here."""
        missing = {step.name for step in left} | {at_work.step.name for at_work in self._at_work}
        for step in left:
            # What is read may depend on what is needed.
            needed = missing.isdisjoint(step.needs) and missing.isdisjoint((*step.reads(self._run), *step.after))
            if step.anywhere and needed:
                return step
        first = next((step for step in left if not step.anywhere), None)
        # What is made here may depend on any step before it.
        return first if first is not None and missing.isdisjoint(self._earlier(first)) else None

    def _earlier(self, step: Step) -> list[str]:
        """The names of the steps before a step in the order of the run."""
        names = list(self._run.steps)
        return names[: names.index(step.name)]

    def _begin(self, step: Step) -> None:
        """Gives a step to the machines, after what it reads and is deleted was made again here."""
        for deleted in self._run.before(step):
            self._run.do(deleted, whole=True)
        state = self._state()
        futures = self._submit(state, step, step.jobs(self._run))
        self._at_work.append(_AtWork(step, state, futures))

    def _state(self) -> RunState:
        return state_of(self._run, self._shape, self._machines.share)

    def _submit(self, state: RunState, step: Step, jobs: Sequence[tuple[Any, ...]]) -> list[Future[Done]]:
        """Gives jobs to the machines, and files that the step reads to those that share no disk."""
        if self._exchange is not None:
            listing = self._exchange.put(read_by(self._run, step), state.inputs)
            state = dataclasses.replace(state, listing=listing)
        return [self._machines.executor.submit(work_on, state, step.name, *job) for job in jobs]

    def _bring(self, done: Done) -> None:
        """Brings what a task wrote here, if files are exchanged."""
        if self._exchange is not None:
            self._exchange.get(done.listing)

    def _finish(self, record: Record) -> None:
        """Waits until a step is complete, and records it."""
        names = [at_work.step.name for at_work in self._at_work]
        machines = number_of(self._machines.count, "machine")
        left = {future for at_work in self._at_work for future in at_work.futures}
        with self._progress.task(f"{machines}: {', '.join(names)}", len(left)) as bar:
            while not (ended := [each for each in self._at_work if left.isdisjoint(each.futures)]):
                done, left = self._machines.wait(left, self._progress)
                for future in done:
                    self._bring(future.result())  # an error ends the run at once
                    bar.advance()
        for each in ended:
            self._at_work.remove(each)
            record(each.step, self._product(each))

    def _product(self, ended: _AtWork) -> Product:
        """What the machines have made of a step, as if it had been made here."""
        done = [future.result() for future in ended.futures]
        self._repeat(done)
        product = ended.step.joined(self._run, [each.result for each in done])
        folder = self._run.store.folder
        # The folder has another name here where --out is relative.
        there = ended.state.folder
        files = [folder / path.relative_to(there if path.is_relative_to(there) else folder) for path in product.files]
        wait_for(files)
        return dataclasses.replace(product, files=files, seconds=sum(each.seconds for each in done))

    def _repeat(self, done: Sequence[Done]) -> None:
        """Says what was said elsewhere."""
        for kind, text in (remark for each in done for remark in each.remarks):
            (self._progress.info if kind == "info" else self._progress.warn)(text)

    def _helpers(self, step: Step) -> Helpers:
        """The machines, for parts of a step that is made here."""
        call = functools.partial(self._call, self._state(), step)
        return Helpers(call, self._machines.count, self._machines.threads)

    def _call(
        self, state: RunState, step: Step, method: str, shares: Sequence[Any], label: str, progress: Progress
    ) -> list[Any]:
        """Has machines do the shares of a part of a step."""
        futures = self._submit(state, step, [(method, share) for share in shares])
        try:
            with progress.task(label, len(futures)) as bar:
                left = set(futures)
                while left:
                    ended, left = self._machines.wait(left, progress)
                    for future in ended:
                        self._bring(future.result())
                        bar.advance()
        finally:
            for future in futures:
                future.cancel()
        done = [future.result() for future in futures]
        self._repeat(done)
        return [each.result for each in done]
