"""The work of a step in another process, which shares the run directory.

A machine gets the name of a step and of one of its methods. It writes where the step writes here. So a task that is
lost with a machine is done again by another one, and what is found in the directory is as if it had been made here.
Machines that share no disk exchange the files of the run directory (`exchange`): a task begins with those that the step
reads, and ends with sending those that it wrote.
"""

import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Mapping
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
from bitladder.machines import Heard, Remark, wait_for
from bitladder.progress import SILENT
from bitladder.rundir import Manifest, StepRecord
from bitladder.text import Text

INPUTS = ".inputs"  # folder of exchanged files that are not in the run directory


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
