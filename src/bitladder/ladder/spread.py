"""The steps of a run on several machines: each begins when what it reads is complete, wherever a machine is idle.

What one machine must do, such as timing, is done here while others work. Steps are recorded here, and only here.
Another machine gets the name of a step and of one of its methods. It writes where the step writes here. So a task that
is lost with a machine is done again by another one, and what is found in the directory is as if it had been made here.
Machines that share no disk exchange the files of the run directory (`exchange`): a task begins with those that the step
reads, and ends with sending those that it wrote.
"""

import dataclasses
import functools
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from bitladder import evaluate
from bitladder.engine import main_memory, threads_available
from bitladder.exchange import Listing, SharedFolder, own_folder
from bitladder.gguf import shards_of
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.model_shape import ModelShape
from bitladder.ladder.options import RunOptions
from bitladder.ladder.plan import steps_of
from bitladder.ladder.source import Other, Source
from bitladder.ladder.steps.step import Product, Step
from bitladder.ladder.store import Store
from bitladder.machines import Heard, Machines, Remark, wait_for
from bitladder.progress import SILENT, Progress
from bitladder.rundir import Manifest, StepRecord
from bitladder.text import Text
from bitladder.trial import Helpers
from bitladder.units import number_of

INPUTS = ".inputs"  # folder of exchanged files that are not in the run directory
# What is done with a step when its turn has come: it gets the step, and what other machines have made of it.
Record = Callable[[Step, Product | None], None]


@dataclasses.dataclass(frozen=True)
class RunState:
    """What another process needs to know of a run. Paths are absolute, and the same on all machines with a common disk.

    Parameters:
        folder: the run directory.
        options: the options of the run.
        source: the model that the run starts from.
        texts: the texts to measure with.
        calibration: the texts to calibrate on.
        tasks: the benchmarks to score with.
        others: files of somebody else.
        shape: the matrices of the model.
        records: the complete steps, by name.
        digests: what they wrote, by name (`Run.digest`).
        share: URL of the folder where files are exchanged; None with a common disk.
        inputs: files outside of the run directory that steps read, by the names that they have below the folder of a
            machine that exchanges files.
        listing: what there is, of what the step reads.
    """

    folder: pathlib.Path
    options: RunOptions
    source: Source
    texts: tuple[Text, ...]
    calibration: tuple[Text, ...]
    tasks: tuple[evaluate.QuestionSet, ...]
    others: tuple[Other, ...]
    shape: ModelShape
    records: Mapping[str, StepRecord]
    digests: Mapping[str, Any]
    share: str | None = None
    inputs: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    listing: Listing = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a task gave.

    Parameters:
        result: of the method.
        remarks: what it said.
        seconds: how long it took.
        listing: the files that it wrote, if they are exchanged.
    """

    result: Any
    remarks: tuple[Remark, ...]
    seconds: float
    listing: Listing = dataclasses.field(default_factory=dict)


def state_of(run: Run, shape: ModelShape, share: str | None = None) -> RunState:
    """The state of a run, for another process."""
    source = dataclasses.replace(run.source, path=run.source.path.resolve())
    others = tuple(dataclasses.replace(other, path=other.path.resolve()) for other in run.others.values())
    texts, calibration = tuple(run.texts), tuple(run.calibration)
    folder, tasks = run.store.folder.resolve(), tuple(run.tasks)
    records, digests = run.records()
    parts = [part for other in others for part in shards_of(other.path)]
    parts += shards_of(source.path) if source.is_gguf else ()
    folders = list(dict.fromkeys(part.parent for part in parts))  # shards stand beside each other
    inputs = {f"{INPUTS}/{folders.index(part.parent)}/{part.name}": part for part in parts}
    return RunState(
        folder, run.options, source, texts, calibration, tasks, others, shape, records, digests, share, inputs
    )


def read_by(run: Run, step: Step) -> list[pathlib.Path]:
    """The files of a run directory that a step reads, journals and rendered blocks included."""
    layout = run.layout
    paths = [path for name in step.reads(run) for path in run.files(name)]
    if step.cache:
        work = [layout.material_work(smoothed=smoothed) for smoothed in (False, True)]
        paths += [path for folder in (*work, *layout.blocks(step.cache)) for path in folder.glob("*")]
    return [path for path in paths if path.is_file() and path.is_relative_to(layout.folder)]


class _Kept:
    """The run that a thread opened last. What it has loaded serves the next task of the same step.

    The files that a thread exchanges serve all tasks of the run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, tuple[RunState, Run]] = {}
        self._exchanges: dict[tuple[int, str], SharedFolder] = {}

    def exchange(self, url: str) -> SharedFolder:
        """The files that this thread exchanges, in a folder of their own."""
        key = threading.get_ident(), url
        with self._lock:
            if key not in self._exchanges:
                self._exchanges[key] = SharedFolder(url, own_folder())
            return self._exchanges[key]

    def run(self, state: RunState) -> Run:
        """The open run of a state. One of another state is closed first."""
        thread = threading.get_ident()
        with self._lock:
            known = self._runs.get(thread)
        if known is not None and known[0] == state:
            return known[1]
        self.close(thread)
        run = _open(state if state.share is None else _here(state, self.exchange(state.share).folder))
        with self._lock:
            self._runs[thread] = (state, run)
        return run

    def close(self, thread: int) -> None:
        """Closes the run of a thread, if it has one."""
        with self._lock:
            known = self._runs.pop(thread, None)
        if known is not None:
            known[1].close()

    def close_all(self) -> None:
        """Closes the runs of all threads, which must be idle."""
        for thread in list(self._runs):
            self.close(thread)
        for exchange in self._exchanges.values():
            shutil.rmtree(exchange.folder, ignore_errors=True)
        self._exchanges.clear()


_kept = _Kept()


def close_kept() -> None:
    """Frees what this process keeps of the last run. No task may be at work."""
    _kept.close_all()


def work_on(state: RunState, step: str, method: str, *arguments: Any) -> Done:
    """Calls a method of a step. It is called in the process that does the work.

    Parameters:
        state: of the run.
        step: name of the step.
        method: name of the method.
        arguments: what it gets after the run.

    Raises:
        BitladderError: as the method, or a file of the run is not seen here.
    """
    began, heard = time.monotonic(), Heard()
    exchange = None if state.share is None else _kept.exchange(state.share)
    if exchange is not None:
        exchange.hold(state.listing)
    run = _kept.run(state)
    run.hear(heard)
    (own,) = (each for each in steps_of(state.options, [other.name for other in state.others]) if each.name == step)
    wait_for([path for name in own.reads(run) for path in run.files(name)])
    result = getattr(own, method)(run, *arguments)
    listing = {} if exchange is None else exchange.put(exchange.changed())
    if isinstance(result, Product):
        files = [state.folder / path.relative_to(run.store.folder) for path in result.files]
        result = dataclasses.replace(result, files=files)
    return Done(result, tuple(heard.remarks), round(time.monotonic() - began, 3), listing)


def _here(state: RunState, folder: pathlib.Path) -> RunState:
    """The same state with the paths that files have below a folder of this machine."""
    paths = {path: folder / name for name, path in state.inputs.items()}
    source = dataclasses.replace(state.source, path=paths.get(state.source.path, state.source.path))
    others = tuple(dataclasses.replace(other, path=paths[other.path]) for other in state.others)
    return dataclasses.replace(state, folder=folder, source=source, others=others)


def _open(state: RunState) -> Run:
    threads = state.options.decoding.threads or threads_available()
    memory = main_memory()
    return Run(
        state.options,
        state.source,
        Store(state.folder, Manifest(), SILENT),  # it is never written
        steps=(),
        texts=state.texts,
        calibration=state.calibration,
        tasks=state.tasks,
        others=state.others,
        progress=SILENT,
        rounding_threads=cost.rounding_threads(state.shape, threads, memory) if memory else threads,
        known=(state.records, state.digests),
    )


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
