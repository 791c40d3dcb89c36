"""A run: the steps of the plan, each done unless the run directory has it already."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from bitladder import quantize
from bitladder.gguf import shards_of
from bitladder.ladder.checks import check_options, check_room, check_texts, refuse_other_model
from bitladder.ladder.context import BASE, Run, read_json
from bitladder.ladder.estimate import (
    Machine,
    estimate_steps,
    extent_of,
    in_words,
    measure_machine,
    question_counts,
    shape_of,
    tasks_of,
)
from bitladder.ladder.model_shape import ModelShape
from bitladder.ladder.options import RunOptions, choose_rungs, command_line
from bitladder.ladder.plan import steps_of
from bitladder.ladder.source import Other, Source, describe, find_others, locate
from bitladder.ladder.spread import Spread, close_kept
from bitladder.ladder.steps.step import Extent, Product, Step, TextsOfRun
from bitladder.ladder.store import Store, open_store
from bitladder.ladder.tracker import Pace, Tracker, Watch
from bitladder.machines import Machines
from bitladder.progress import SILENT, Progress
from bitladder.rundir import Layout, RunRecord, load_manifest, naive
from bitladder.text import load_text, load_texts

# Seconds: runs that take longer say at the start how long, and those that take longer still measure the machine first.
TOLD_FROM, MEASURED_FROM = 60, 300


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Parameters:
        folder: the run directory.
        made: names of the steps that did work. A step that was complete did none.
        labels: "base", the rungs, and the names of files of somebody else.
        rungs: names of the rungs.
        scores: the Scores JSON of each label.
    """

    folder: pathlib.Path
    made: tuple[str, ...]
    labels: tuple[str, ...]
    rungs: tuple[str, ...]
    scores: list[dict[str, Any]]


def run(options: RunOptions, *, progress: Progress = SILENT, watch: Watch | None = None) -> RunResult:
    """Makes the ladder that the options describe, or completes it.

    A step that is complete is not made again. After an error the complete steps stay.

    Parameters:
        options: the options of the run.
        progress: gets bars and remarks.
        watch: gets the state of the run when it changes.

    Raises:
        UsageError: a step cannot use an option or a text. This is found before any work.
        BitladderError: anything else. It is found before the work where that is possible.
    """
    rungs = choose_rungs(options.rungs)
    left_out = left_out_rungs(options, rungs)
    if options.keep:
        rungs, left_out = (*rungs, *left_out), ()
    options = options.replace(rungs=rungs)
    source = locate(options.model)
    # Of a checkpoint, conversations are rendered when it is converted and so has its chat template.
    full = source.path if source.is_gguf else None
    texts = load_texts(options.texts, full, assistant_only=options.assistant_only)
    calibration = [load_text(spec, full) for spec in options.calibration]
    check_options(options, source, texts, calibration, progress)
    shape = shape_of(str(source.path))  # refuses what is not a model before a directory is made
    tasks = tasks_of(options)
    others = find_others(options.compare, (BASE, *quantize.preset_names()))
    steps = steps_of(options, [other.name for other in others])
    questions = question_counts(tasks, options)
    models = 1 + len(rungs) + len(others)
    extent = extent_of(options, shape, texts, calibration, questions, models=models, full=full)
    keep = source.path if source.is_gguf else None
    if source.is_gguf:
        describe(source.path)  # refuses what is quantized already
        check_texts(steps, TextsOfRun(texts, calibration, source.path))
    with open_store(options.out, keep=keep, progress=progress) as store:
        refuse_other_model(options, source, store)
        pace = Pace({step.name: step.parts(extent) for step in steps})
        tracker = Tracker(pace, len(steps), rungs, progress, watch)
        context = Run(
            options,
            source,
            store,
            steps=steps,
            texts=texts,
            calibration=calibration,
            tasks=tasks,
            others=others,
            progress=tracker,
            rounding_threads=extent.rounding_threads,
        )
        with context, machines_of(options, source, others, store, progress) as machines:
            due = context.due()
            pace.keep(due)
            expect([step for step in steps if step.name in due], extent, options, progress)
            store.begin(run_record(options, recorded_as(source, store), others, store.manifest.run))
            if left_out:
                names = ", ".join(left_out)
                them = "it" if len(left_out) == 1 else "them"
                progress.info(f"{names}: not in the card, because --ladder does not name {them} (--keep does)")
            make_steps(context, steps, tracker, machines, shape)
        store.finish()
        labels = (BASE, *rungs, *(other.name for other in others))
        scores = [read_json(context.layout.scores(label)) for label in labels]
        return RunResult(store.folder, tuple(store.made), labels, rungs, scores)


def make_steps(run: Run, steps: Sequence[Step], tracker: Tracker, machines: Machines | None, shape: ModelShape) -> None:
    """Makes all steps that are not complete: one after the other, or side by side on several machines."""
    left, store = list(steps), run.store

    def record(step: Step, made: Product | None = None) -> None:
        """Makes a step, if no other machine has made it, and keeps its record."""
        left.remove(step)
        if run.waits(step):
            run.do(step)
            return
        for each in (*run.before(step), step) if made is None else (step,):
            # What another machine did tells nothing of the pace of this one.
            did = functools.partial(store.made.__contains__, each.name) if made is None else bool
            with tracker.step(each.name, steps.index(step) + 1, made=did):
                run.do(each, whole=each is not step, made=made)
                tell(tracker, each, run.layout)
        if step.verb == "convert" and not run.source.is_gguf:  # the vocabulary is known from here on
            check_texts(steps, TextsOfRun(run.texts, run.calibration, run.full))
        run.free(left if machines is None else [each for each in left if not each.anywhere])
        if run.options.release:
            run.release(left)

    if machines is None:
        for step in steps:
            record(step)
    else:
        Spread(run, machines, shape, tracker.progress).make(steps, record)


@contextlib.contextmanager
def machines_of(
    options: RunOptions, source: Source, others: Sequence[Other], store: Store, progress: Progress
) -> Iterator[Machines | None]:
    """The machines of --cluster, after they were checked; None without."""
    if options.cluster is None:
        yield None
        return
    from bitladder.cluster import connected

    files = [*(shards_of(source.path) if source.is_gguf else ()), *(other.path for other in others)]
    with connected(
        options.cluster, store.folder, files, share=options.share, last=close_kept, progress=progress
    ) as machines:
        yield machines


def expect(left: Sequence[Step], extent: Extent, options: RunOptions, progress: Progress) -> None:
    """Says what the steps that are left take, and refuses what does not fit. If they take long, the machine is measured
    first."""
    if not left:
        return
    machine = Machine(threads=extent.threads)
    expected = estimate_steps(left, extent, machine, release=options.release)
    if expected.seconds >= MEASURED_FROM:
        machine = measure_machine(extent.threads, rounds=options.rounds)
        expected = estimate_steps(left, extent, machine, release=options.release)
    check_room(options, expected, estimate_steps(left, extent, machine, release=True), progress)
    if expected.seconds > TOLD_FROM:
        progress.info(f"{in_words(expected)} (an estimate)")


def left_out_rungs(options: RunOptions, rungs: tuple[str, ...]) -> tuple[str, ...]:
    """The rungs that the run directory has and that the run does not name, in the usual order."""
    manifest = load_manifest(options.out) if options.out.is_dir() and not options.replace_model else None
    if manifest is None:
        return ()
    return tuple(
        rung
        for rung in dict.fromkeys((*quantize.RUNGS, *quantize.preset_names()))
        if rung not in rungs and f"quantize {rung}" in manifest.steps
    )


def tell(tracker: Tracker, step: Step, layout: Layout) -> None:
    """Reports the figures of a rung to those who watch."""
    if step.rung and step.verb == "measure":
        tracker.rung_scored(step.rung, read_json(layout.measured(step.rung)))
    elif step.rung and step.verb == "naive":
        tracker.rung_scored(step.rung, read_json(layout.measured(naive(step.rung))), "plain preset")


def recorded_as(source: Source, store: Store) -> Source:
    """The model as the record names it: the checkpoint of the ladder, if it is the file that the ladder made of it."""
    convert, last = store.manifest.steps.get("convert"), store.manifest.run
    if convert is None or last is None or not convert.outputs or not source.is_full_model_of(convert, store):
        return source
    return dataclasses.replace(source, name=last.model, model_id=last.model_id)


def run_record(options: RunOptions, source: Source, others: list[Other], last: RunRecord | None) -> RunRecord:
    """The record of this run for the manifest. The repository of the last run stays, unless another one is named."""
    return RunRecord(
        command=command_line(options, source.name),
        model=source.name,
        model_id=options.model_id or source.model_id,
        datasets=options.datasets,
        repo=options.repo or (last.repo if last else None),
        rungs=options.rungs,
        n_ctx=options.decoding.n_ctx,
        quantized_by=options.quantized_by,
        mode=options.mode if options.plans else None,
        compared=tuple(other.name for other in others),
    )
